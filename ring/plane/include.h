/* The pump's contract as C sees it, with what ring.h and pump.h may not hold themselves. */
#pragma once

#include "../core/include.h"
#include "pump.h"
