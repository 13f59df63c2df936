// What decays the state: nothing, one gate per head, or one per key channel.
#pragma once

namespace icrl {

enum class Gate : int { none = 0, scalar = 1, channel = 2 };

}  // namespace icrl
