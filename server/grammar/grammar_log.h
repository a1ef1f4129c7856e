// What xgrammar has to say while it compiles, on the thread that has it compile.
#ifndef SOLOIST_SERVER_GRAMMAR_GRAMMAR_LOG_H_
#define SOLOIST_SERVER_GRAMMAR_GRAMMAR_LOG_H_

#include <string>

namespace soloist {

// Keeps the first warning that xgrammar gives on this thread while it lives. One at a time per thread.
class GrammarWarning {
 public:
  GrammarWarning();
  ~GrammarWarning();
  GrammarWarning(const GrammarWarning&) = delete;
  GrammarWarning& operator=(const GrammarWarning&) = delete;

  // Empty: none so far.
  const std::string& text() const { return text_; }
  void Add(const std::string& text) {
    if (text_.empty()) text_ = text;
  }

 private:
  std::string text_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRAMMAR_GRAMMAR_LOG_H_
