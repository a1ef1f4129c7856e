// The description that is served at /openapi.json: openapi.json, as it is.
#ifndef SOLOIST_SERVER_HTTP_OPENAPI_H_
#define SOLOIST_SERVER_HTTP_OPENAPI_H_

#include <string_view>

namespace soloist {

std::string_view OpenApiJson();

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_OPENAPI_H_
