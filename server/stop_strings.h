// Stop strings, found while text arrives in pieces of any size.
//
// The stop that is complete first decides (of those that end at the same byte, the longest), so the result does not
// depend on how the text was cut into pieces. Text is cut where that stop begins.
#ifndef SOLOIST_SERVER_STOP_STRINGS_H_
#define SOLOIST_SERVER_STOP_STRINGS_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace soloist {

// The strings of one request, prepared. Immutable; shared by its outputs.
class StopStrings {
 public:
  // None of them empty.
  explicit StopStrings(std::vector<std::string> strings);

  const std::vector<std::string>& strings() const { return strings_; }

 private:
  friend class StopMatcher;
  std::vector<std::string> strings_;
  // Knuth-Morris-Pratt: [string][i] length of the longest proper prefix of string that ends its first i bytes.
  std::vector<std::vector<int>> failure_;
};

// One output. Holds back at most the longest stop string's length - 1 bytes. Costs O(number of strings) per byte.
class StopMatcher {
 public:
  // `stops` must outlive it.
  StopMatcher(const StopStrings& stops, bool include_in_output);

  // Returns the text that is decided by now: never the beginning of what may become a stop string. Nothing after a
  // match.
  std::string Push(std::string_view text);
  // The text has ended: returns what was held back.
  std::string Flush();

  // Index of the stop string that was found, or -1.
  int matched() const { return matched_; }

 private:
  const StopStrings& stops_;
  const bool include_in_output_;
  std::vector<int> state_;  // [string] bytes of it that end the text so far
  std::string held_;
  int matched_ = -1;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_STOP_STRINGS_H_
