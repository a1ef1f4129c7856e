// Output forms: what is refused and in which words, masks against texts that the form does and does not have, the cache
// and its bound, many threads at a time.
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "base/status.h"
#include "engine/step.h"
#include "gtest/gtest.h"
#include "server/grammar/grammar_compiler.h"

namespace soloist {
namespace {

using Kind = OutputForm::Kind;

OutputForm Form(Kind kind, std::string text) { return {.kind = kind, .text = std::move(text), .choices = {}}; }
OutputForm Choice(std::vector<std::string> choices) {
  return {.kind = Kind::kChoice, .text = {}, .choices = std::move(choices)};
}

class GrammarTest : public testing::Test {
 protected:
  // Masks are computed on the calling thread.
  std::unique_ptr<GrammarCompiler> Compiler(const GrammarOptions& options = {}) {
    return GrammarCompiler::Create(*tokenizer_, vocab_, {{eos_}}, options,
                                   [](const std::function<void()>& job) { job(); });
  }
  std::string Refusal(const OutputForm& form) {
    const auto source = compiler_->Compile(form);
    return source.ok() ? "accepted" : std::string(source.status().message());
  }
  // "": the text has the form and its tokens are allowed one after another; else what stands against it.
  std::string Follow(const OutputForm& form, const std::string& text) {
    const auto source = compiler_->Compile(form);
    if (!source.ok()) return std::string(source.status().message());
    int ready = 0;
    const auto constraint = (*source)->Start([&ready] { ++ready; });
    int tokens = 0;
    for (const int32_t token : tokenizer_->Encode(text, {.add_special_tokens = false})) {
      const NextTokens* next = constraint->Poll();
      EXPECT_NE(next, nullptr);
      if (!next->status.ok()) return std::string(next->status.message());
      if (next->complete) return fmt::format("complete before token {}", tokens);
      if (!AllowsToken(next->mask, token)) return fmt::format("token {} is not allowed", tokens);
      constraint->Advance(token);
      EXPECT_EQ(ready, ++tokens + 1);
    }
    const NextTokens* next = constraint->Poll();
    if (next->complete) return "";
    return AllowsToken(next->mask, eos_) ? "may end" : "incomplete";
  }

  const std::unique_ptr<const Tokenizer> tokenizer_ = *Tokenizer::Load("models/tiny");
  const int32_t vocab_ = tokenizer_->vocab_size();
  const int32_t eos_ = *tokenizer_->eos_id();
  const std::unique_ptr<GrammarCompiler> compiler_ = Compiler();
};

TEST_F(GrammarTest, Texts) {
  const OutputForm schema = Form(Kind::kJsonSchema, R"({"type": "object", "properties": {"a": {"type": "integer"},
      "b": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": false})");
  EXPECT_EQ(Follow(schema, R"({"a": 12, "b": "y"})"), "");
  EXPECT_EQ(Follow(schema, "{\n  \"a\": -3\n}"), "");
  EXPECT_EQ(Follow(schema, R"({"a": 1)"), "incomplete");
  EXPECT_NE(Follow(schema, R"({"b": "y"})"), "");
  EXPECT_NE(Follow(schema, R"({"a": 1.5})"), "");
  EXPECT_NE(Follow(schema, R"({"a": 1, "c": 2})"), "");
  EXPECT_EQ(Follow(Form(Kind::kJsonObject, ""), R"({"k": [1, 2.5e3, null, {"z": "é\n"}]})"), "");
  EXPECT_NE(Follow(Form(Kind::kJsonObject, ""), "[1]"), "");
  EXPECT_EQ(Follow(Form(Kind::kRegex, "[a-c]+[0-9]{2}"), "abc42"), "");
  EXPECT_EQ(Follow(Form(Kind::kRegex, "^a*$"), "aaa"), "may end");
  EXPECT_NE(Follow(Form(Kind::kRegex, "[a-c]+[0-9]{2}"), "abd42"), "");
  EXPECT_EQ(Follow(Form(Kind::kGrammar, "root ::= \"(\" root \")\" | \"x\""), "((x))"), "");
  EXPECT_NE(Follow(Form(Kind::kGrammar, "root ::= \"(\" root \")\" | \"x\""), "((x)"), "");
  const OutputForm choice = Choice({"yes", "no", "not \"\\\n\x01 so", "größer"});
  for (const char* text : {"yes", "not \"\\\n\x01 so", "größer"}) EXPECT_EQ(Follow(choice, text), "") << text;
  EXPECT_EQ(Follow(choice, "no"), "may end");
  EXPECT_NE(Follow(choice, "maybe"), "");
}

TEST_F(GrammarTest, Refusals) {
  const struct {
    OutputForm form;
    std::string message;
  } cases[] = {
      {{}, "the response format names none"},
      {Form(Kind::kJsonSchema, ""), "json_schema: it is empty"},
      {Form(Kind::kJsonSchema, "{"),
       "json_schema: Failed to parse JSON: syntax error at line 1 near: . The JSON string "
       "is:{"},
      {Form(Kind::kJsonSchema, "3"), "json_schema: Schema should be an object or bool, but got 3"},
      {Form(Kind::kJsonSchema, R"({"type": "strin"})"), "json_schema: Unsupported type \"strin\""},
      {Form(Kind::kJsonSchema, R"({"properties": {"not": {"not": {}}}})"),
       "json_schema: the keyword 'not' at '#/properties/not' is not supported"},
      {Form(Kind::kJsonSchema, R"({"items": {"type": "array", "uniqueItems": true}})"),
       "json_schema: the keyword 'uniqueItems' at '#/items' is not supported"},
      {Form(Kind::kJsonSchema, R"({"type": "object", "anyOf": [{}], "required": ["a"]})"),
       "json_schema: the keyword 'required' beside 'anyOf' at '#' is not supported"},
      {Form(Kind::kJsonSchema, R"({"type": "number", "multipleOf": 0.5})"),
       "json_schema: multipleOf is not supported for type:number; ignoring multipleOf"},
      {Form(Kind::kRegex, "(a"), "regex: Regex parsing error at position 3: The parenthesis is not closed."},
      {Form(Kind::kRegex, "a^b"),
       "regex: Regex parsing warning at position 2: '^' should be at the start of the regex, but found in the middle. "
       "It "
       "is ignored."},
      {Form(Kind::kRegex, std::string("a\0b", 3)), "regex: it has a zero byte"},
      {Form(Kind::kRegex, "((a{100}b){100}c){3,100}"),
       "regex: its repetitions {m,n} written out are 1010100 items, the limit is 10024"},
      {Form(Kind::kRegex, std::string(65, '(') + "a" + std::string(65, ')')),
       "regex: brackets are 65 deep, the limit is 64"},
      {Form(Kind::kRegex, std::string(70'000, 'a')), "regex: 70000 bytes, the limit is 65536"},
      {Form(Kind::kGrammar, "top ::= \"a\""),
       "grammar: EBNF parser error at line 1, column 1: The root rule with name \"root\" is not found"},
      {Form(Kind::kGrammar, "root ::= other"),
       "grammar: EBNF parser error at line 1, column 10: Rule \"other\" is not defined"},
      {Choice({}), "choice: there is none"},
      {Choice({"a", ""}), "choice: number 1 is empty"},
      {Choice(std::vector<std::string>(1025, "a")), "choice: 1025 choices, the limit is 1024"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(Refusal(c.form), c.message) << c.form.text.substr(0, 100);
    EXPECT_EQ(compiler_->Compile(c.form).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(compiler_->stats().compiled, 0);
}

// A form that no text has is found out by its first mask.
TEST_F(GrammarTest, FormWithoutText) {
  EXPECT_EQ(Follow(Form(Kind::kJsonSchema, R"({"$ref": "#"})"), "x"),
            "no token of the vocabulary continues the output's form");
}

TEST_F(GrammarTest, SpecialTokensAndThoseBeyondTheTokenizerAreNotAllowed) {
  const auto compiler = GrammarCompiler::Create(*tokenizer_, vocab_ + 40, {{eos_, vocab_ + 3}}, {},
                                                [](const std::function<void()>& job) { job(); });
  const auto constraint = (*compiler->Compile(Form(Kind::kRegex, "(.|\n)*")))->Start({});
  const NextTokens* next = constraint->Poll();
  ASSERT_NE(next, nullptr);
  ASSERT_EQ(std::ssize(next->mask), TokenMaskWords(vocab_ + 40));
  for (int32_t t = 0; t < vocab_ + 40; ++t) {
    if (t == eos_ || t == vocab_ + 3) {
      EXPECT_TRUE(AllowsToken(next->mask, t)) << t;
    } else if (t >= vocab_ || tokenizer_->IsSpecial(t)) {
      EXPECT_FALSE(AllowsToken(next->mask, t)) << t;
    }
  }
  EXPECT_TRUE(AllowsToken(next->mask, tokenizer_->Encode("a", {.add_special_tokens = false})[0]));
}

TEST_F(GrammarTest, CacheKeepsTheLatestForms) {
  const auto pattern = [](int i) { return Form(Kind::kRegex, fmt::format("a{{{}}}", i + 1)); };
  ASSERT_TRUE(compiler_->Compile(pattern(19)).ok());  // the largest
  const int64_t one = compiler_->stats().cached_bytes;
  EXPECT_GT(one, 0);
  const auto compiler = Compiler({.max_cache_bytes = 4 * one});
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(compiler->Compile(pattern(i)).ok());
    ASSERT_TRUE(compiler->Compile(pattern(i)).ok());
    EXPECT_LE(compiler->stats().cached_bytes, 4 * one);
  }
  EXPECT_EQ(compiler->stats().compiled, 20);
  EXPECT_EQ(compiler->stats().cache_hits, 20);
  EXPECT_NE(compiler->Find(pattern(19)), nullptr);
  EXPECT_EQ(compiler->Find(pattern(0)), nullptr);
  // The same text as another kind is another form.
  EXPECT_EQ(compiler->Find(Form(Kind::kGrammar, pattern(19).text)), nullptr);
}

TEST_F(GrammarTest, CompilingThatTakesTooLongIsRefused) {
  const auto compiler = Compiler({.max_compile_time = absl::Nanoseconds(1)});
  // Much longer than it takes a thread to wake.
  std::string properties;
  for (int i = 0; i < 600; ++i) properties += fmt::format(R"({}"k{}": {{"type": "string"}})", i == 0 ? "" : ", ", i);
  const OutputForm form =
      Form(Kind::kJsonSchema, fmt::format(R"({{"type": "object", "properties": {{{}}}}})", properties));
  const absl::Status status = compiler->Compile(form).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_EQ(status.message(), "json_schema: compiling it takes longer than 1ns");
  // It is compiled all the same.
  while (compiler->Find(form) == nullptr) std::this_thread::yield();
  EXPECT_TRUE(compiler->Compile(form).ok());
}

// Callers with the same form wait for one compilation.
TEST_F(GrammarTest, OneCompilationForAll) {
  const auto compiler = Compiler({.max_compiling = 1});
  const OutputForm form = Form(Kind::kJsonObject, "");
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([&] { EXPECT_EQ(compiler->Compile(form).status(), absl::OkStatus()); });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(compiler->stats().compiled, 1);
}

// Outputs that are abandoned while their masks are being computed, from several threads, beyond the compiler's life.
TEST_F(GrammarTest, ManyThreads) {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::function<void()>> jobs;
  bool stop = false;
  std::vector<std::thread> workers;
  for (int i = 0; i < 2; ++i) {
    workers.emplace_back([&] {
      std::unique_lock lock(mutex);
      for (;;) {
        changed.wait(lock, [&] { return stop || !jobs.empty(); });
        if (jobs.empty()) return;
        const std::function<void()> job = std::move(jobs.back());
        jobs.pop_back();
        lock.unlock();
        job();
        lock.lock();
      }
    });
  }
  auto compiler =
      GrammarCompiler::Create(*tokenizer_, vocab_, {{eos_}}, {.max_compiling = 8}, [&](std::function<void()> job) {
        {
          const std::lock_guard lock(mutex);
          jobs.push_back(std::move(job));
        }
        changed.notify_one();
      });
  std::vector<std::thread> callers;
  std::vector<std::shared_ptr<const ConstraintSource>> sources(4);
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 12; ++i) {
        const auto source = compiler->Compile(Form(Kind::kRegex, fmt::format("[a-z]{{{},20}}", i % 5 + 1)));
        ASSERT_TRUE(source.ok()) << source.status();
        sources[t] = *source;
        int tokens = 0;
        auto constraint = (*source)->Start([] {});
        while (tokens < i) {
          const NextTokens* next = constraint->Poll();
          if (next == nullptr) continue;
          ASSERT_TRUE(next->status.ok());
          int32_t token = 0;
          while (token == eos_ || !AllowsToken(next->mask, token)) ++token;
          constraint->Advance(token);
          if (++tokens == 12) break;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  compiler.reset();
  for (const auto& source : sources) {
    const auto constraint = source->Start([] {});
    while (constraint->Poll() == nullptr) std::this_thread::yield();
    EXPECT_TRUE(constraint->Poll()->status.ok());
  }
  {
    const std::lock_guard lock(mutex);
    stop = true;
  }
  changed.notify_all();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace
}  // namespace soloist
