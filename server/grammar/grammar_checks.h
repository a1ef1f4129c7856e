// What of a form must be known before xgrammar sees it, since it has no limits of its own.
#ifndef SOLOIST_SERVER_GRAMMAR_GRAMMAR_CHECKS_H_
#define SOLOIST_SERVER_GRAMMAR_GRAMMAR_CHECKS_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace soloist {

// Most brackets open at a time; what a backslash is before does not count.
int64_t BracketDepth(std::string_view text);

// Bound of the items that a regular expression or a grammar rule is when its {m,n} are written out: nested ones
// multiply. Saturates at 2^62.
int64_t RepeatedItems(std::string_view text);

// INVALID_ARGUMENT names a keyword of a JSON schema that xgrammar passes over in silence, and where it stands: the
// output might not have the form. What is no JSON, or no schema, is left to xgrammar to refuse.
absl::Status CheckSchemaKeywords(const std::string& schema);

// root ::= "first" | "second" | ...
std::string ChoiceGrammar(std::span<const std::string> choices);

}  // namespace soloist

#endif  // SOLOIST_SERVER_GRAMMAR_GRAMMAR_CHECKS_H_
