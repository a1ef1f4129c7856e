// The page that the HTTP port shows at /: a prompt box, what the server is doing, where its experts' tokens go.
#ifndef SOLOIST_SERVER_PAGE_PAGE_H_
#define SOLOIST_SERVER_PAGE_PAGE_H_

#include <string_view>

namespace soloist {

// One HTML document (page.html) that asks this server only: /load (LoadReport), /v1/completions and
// /v1/chat/completions.
std::string_view Page();

}  // namespace soloist

#endif  // SOLOIST_SERVER_PAGE_PAGE_H_
