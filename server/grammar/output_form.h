// OutputForm: what a client may ask of a text: a JSON object, a JSON value by a schema, a regular expression, one of
// several texts, a grammar.
#ifndef SOLOIST_SERVER_GRAMMAR_OUTPUT_FORM_H_
#define SOLOIST_SERVER_GRAMMAR_OUTPUT_FORM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace soloist {

struct OutputForm {
  enum class Kind : uint8_t { kNone, kJsonObject, kJsonSchema, kRegex, kChoice, kGrammar };
  Kind kind = Kind::kNone;           // kNone: the client named none (refused)
  std::string text;                  // the schema (JSON), the regular expression, or the grammar (EBNF, rule "root")
  std::vector<std::string> choices;  // kChoice
};

// "json_schema", "regex", ...: for messages.
const char* OutputFormName(OutputForm::Kind kind);

struct OutputFormLimits {
  int64_t max_bytes = 64 << 10;  // of the text, or of all choices together
  int32_t max_choices = 1024;
  int32_t max_depth = 64;            // of brackets in the text
  int64_t max_repetitions = 10'000;  // {m,n} of regular expressions and grammars, nested ones multiplied
};

// What can be told without compiling, in time linear in the text. INVALID_ARGUMENT.
absl::Status CheckOutputForm(const OutputForm& form, const OutputFormLimits& limits);

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRAMMAR_OUTPUT_FORM_H_
