#include "server/stop_strings.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace soloist {

StopStrings::StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
  for (const std::string& s : strings_) {
    CHECK(!s.empty());
    std::vector<int> failure(s.size() + 1, 0);
    for (size_t i = 1; i < s.size(); ++i) {
      int k = failure[i];
      while (k > 0 && s[i] != s[k]) k = failure[k];
      failure[i + 1] = s[i] == s[k] ? k + 1 : 0;
    }
    failure_.push_back(std::move(failure));
  }
}

StopMatcher::StopMatcher(const StopStrings& stops, bool include_in_output)
    : stops_(stops), include_in_output_(include_in_output), state_(stops.strings_.size(), 0) {}

std::string StopMatcher::Push(std::string_view text) {
  if (matched_ >= 0) return {};
  size_t used = 0;
  for (; used < text.size() && matched_ < 0; ++used) {
    size_t best = 0;
    for (size_t i = 0; i < state_.size(); ++i) {
      const std::string& s = stops_.strings_[i];
      int k = state_[i];
      while (k > 0 && text[used] != s[k]) k = stops_.failure_[i][k];
      if (text[used] == s[k]) ++k;
      state_[i] = k;
      if (k == static_cast<int>(s.size()) && s.size() > best) {
        best = s.size();
        matched_ = static_cast<int>(i);
      }
    }
  }
  std::string out = std::move(held_);
  held_.clear();
  out.append(text.substr(0, used));
  if (matched_ >= 0) {
    if (!include_in_output_) out.resize(out.size() - stops_.strings_[matched_].size());
    return out;
  }
  const int hold = state_.empty() ? 0 : *std::ranges::max_element(state_);
  held_ = out.substr(out.size() - hold);
  out.resize(out.size() - hold);
  return out;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace soloist
