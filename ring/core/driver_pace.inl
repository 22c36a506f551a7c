/* A sender with a pace and its partner: frames at a steady rate, and how long each takes to the driver that receives it.
 *
 * One thread is both drivers, so that the time between two sent frames is not idle and no second thread wants its
 * processor: while it waits for the next frame to be due, it looks at the partner's ring. The partner asks for a call
 * each time it has taken all there is, as a driver does before it sleeps, so that the device pays for notifications; but
 * the time a frame takes does not include the waking up of a thread, which is no work of the device.
 */

#define SENT_AT 65536       /* frames whose time of sending is remembered: more than can be on their way */
#define CATCH_UP_NS 1000000 /* what was missed by more than this is not made up for */
#define CLASS_BITS 4        /* latencies: 16 classes an octave */

static uint32_t class_of(uint64_t ns)
{
    uint32_t octave = 0;

    while (ns >> octave >= 2u << CLASS_BITS)
        octave++;
    uint32_t index = (octave << CLASS_BITS) + (uint32_t)(ns >> octave);
    return index < DRIVER_LATENCIES ? index : DRIVER_LATENCIES - 1;
}

uint64_t driver_latency_ns(uint32_t index)
{
    uint32_t octave = index >> CLASS_BITS;

    if (octave < 2)
        return index;
    return (uint64_t)((index & ((1u << CLASS_BITS) - 1)) | 1u << CLASS_BITS) << (octave - 1);
}

static void note_sending(const struct driver *d)
{
    if (d->config.partner)
        d->config.partner->sent_at[d->sequence % SENT_AT] = now_ns();
}

static void note_arrival(struct driver *d, uint64_t sequence)
{
    if (d->latency)
        count(&d->latency[class_of(now_ns() - d->sent_at[sequence % SENT_AT])], 1);
}

void driver_latencies_get(const struct driver *d, uint64_t *out)
{
    for (uint32_t i = 0; i < DRIVER_LATENCIES; i++)
        out[i] = d->latency ? __atomic_load_n(&d->latency[i], __ATOMIC_RELAXED) : 0;
}

/* -> false: no memory */
static bool take_partner(struct driver *partner)
{
    if (!partner || partner->latency)
        return true;
    partner->sent_at = calloc(SENT_AT, sizeof(*partner->sent_at));
    partner->latency = calloc(DRIVER_LATENCIES, sizeof(*partner->latency));
    return partner->sent_at && partner->latency;
}
