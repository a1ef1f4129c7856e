// soloist inspect: what a checkpoint holds and what a layout of it needs, without loading it.
#include <memory>
#include <string>

#include "base/status.h"
#include "cli/flags.h"
#include "engine/model/config.h"
#include "engine/model/footprint.h"
