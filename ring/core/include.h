/* The contract as C sees it: ring.h may hold no guard and no #include, so both stand here. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ring.h"
