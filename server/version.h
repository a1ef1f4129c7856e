// What GetServerInfo and --version say.
#ifndef SOLOIST_SERVER_VERSION_H_
#define SOLOIST_SERVER_VERSION_H_

#include <cstdint>

namespace soloist {

inline constexpr char kVersion[] = "0.1.0";
// One more with each addition to proto/soloist/v1.
inline constexpr int32_t kSchemaRevision = 3;

}  // namespace soloist

#endif  // SOLOIST_SERVER_VERSION_H_
