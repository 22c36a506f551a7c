/* The contracts of the plane as C sees them, with what ring.h, pump.h and offload.h may not hold themselves. */
#pragma once

#include "../core/include.h"
#include "fabric.h"
#include "settings.h"
#include "pump.h"
#include "offload.h"
