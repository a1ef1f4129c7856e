#include "server/grammar/grammar_log.h"

#include <stdexcept>

#include "base/check.h"
#include "base/logging.h"

namespace soloist {
namespace {

thread_local GrammarWarning* listener = nullptr;

}  // namespace

GrammarWarning::GrammarWarning() {
  CHECK(listener == nullptr);
  listener = this;
}

GrammarWarning::~GrammarWarning() { listener = nullptr; }

static void Log(int level, const std::string& message) {
  constexpr int kWarning = 1;
  if (level >= kWarning && listener != nullptr) return listener->Add(message);
  spdlog::debug("xgrammar: {}", message);
}

}  // namespace soloist

// What xgrammar calls, compiled with XGRAMMAR_LOG_CUSTOMIZE. It declares them in no header.
namespace xgrammar {

[[noreturn]] void LogFatalImpl(const std::string& file, int lineno, const std::string& message);
void LogMessageImpl(const std::string& file, int lineno, int level, const std::string& message);

// xgrammar's own way out of an error; caught where it is called.
void LogFatalImpl(const std::string&, int, const std::string& message) { throw std::runtime_error(message); }

void LogMessageImpl(const std::string&, int, int level, const std::string& message) { soloist::Log(level, message); }

}  // namespace xgrammar
