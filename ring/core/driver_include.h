/* The load generator's contract as C sees it, with what driver.h may not hold itself. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "driver.h"
