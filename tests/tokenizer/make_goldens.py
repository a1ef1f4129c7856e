"""Makes tests/tokenizer/data: small tokenizers with the pipelines of well-known families, and what the `tokenizers`
package (0.23.3) does with some 2,000 strings. Run by hand: .venv with tokenizers==0.23.3; the output is committed.

strings.json: the strings. NAME/tokenizer.json. NAME/golden.json: what special tokens put around (prefix, suffix), and per
string [ids without them, their text (special tokens skipped) where it is not the string itself].
"""

import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TOP = pathlib.Path(__file__).resolve().parents[2]
DATA = TOP / "tests/tokenizer/data"

GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXT = ["Once upon a time there was a little dragon who liked to read books about the sea. ",
        "It's what they'll say: \"don't\", 'we're', I'VE 1234567 times, 3.14159 or 2024-11-24!\n",
        "def main(argc, argv):\n    for i in range(10):\n\treturn x[i] += 1 // 2;\r\n",
        "Größe, naïve café, Ærøskøbing, São Paulo, Kraków, İstanbul. ",
        "Привет, мир! Жил-был у бабушки серенький козлик. ", "日本語のテキストと漢字、ひらがな。 ",
        "中文字符测试，没有空格。", "안녕하세요 세계 ", "مرحبا بالعالم ", "שלום עולם ", "नमस्ते दुनिया ", "สวัสดีชาวโลก ",
        "Γειά σου Κόσμε ", "🐉🔥 👩‍👩‍👧 👍🏽 🇩🇪 ", "½ ² Ⅷ ٣ 五 ", "e\u0301 n\u0303 A\u030a ﬁ Å ①"]


def byte_level(name, vocab=500):
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama3", "gpt-oss")))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern, behavior="isolated", invert=False):
        return pre_tokenizers.Split(Regex(pattern), behavior, invert)
    if name == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "roberta":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif name == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(GPT4), level])
    elif name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(QWEN), level])
    elif name == "gpt-oss":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(O200K, "removed", True), level])
    elif name == "deepseek":
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), level])
    elif name == "digits":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s{3,}"), "  ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation("contiguous"),
             split("e", "merged_with_next"), split("o", "merged_with_previous"), level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|begin|>", "<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False),
         processors.TemplateProcessing("<|begin|> $A <|end|>" if name == "roberta" else "<|begin|> $A",
                                       special_tokens=[("<|begin|>", 0), ("<|end|>", 1)])])
    return tokenizer


def sentencepiece(name):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tail = [decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)]
    if name == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " ")] + tail + strip)
        train_with = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    elif name == "mistral":
        tokenizer.pre_tokenizer = train_with = pre_tokenizers.Metaspace("▁", "first", split=False)
        train_with = pre_tokenizers.Metaspace("▁", "first", split=True)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " ")] + tail + strip)
    elif name == "metaspace":
        tokenizer.pre_tokenizer = train_with = pre_tokenizers.Metaspace("▁", "always", split=True)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " ")] + tail + strip)
    elif name == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " ")] + tail)
        train_with = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    final = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = train_with
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=["<unk>", "<s>", "</s>"] + byte_tokens,
                                  limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    # The byte tokens were special for the trainer only.
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
    tree["pre_tokenizer"] = json.loads(final.__getstate__()) if final is not None else None
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def add_tokens(tokenizer, name):
    if name in ("llama3", "mistral", "digits", "llama2", "gemma"):
        tokenizer.add_special_tokens([AddedToken("<|lr|>", lstrip=True, rstrip=True, special=True),
                                      AddedToken("<mask>", lstrip=True, special=True)])
        tokenizer.add_tokens([AddedToken("word", single_word=True, normalized=False),
                              AddedToken("NORM é", normalized=True), AddedToken("<tag>", rstrip=True, normalized=False)])


def strings():
    rng = random.Random(11)
    parts = [p for text in TEXT for p in text.split(" ")] + [
        " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", "<|begin|>", "<|end|>",
        "<s>", "</s>", "<|lr|>", "<mask>", "word", "swords", "word.", "NORM é", "NORM e\u0301", "<tag>", " <tag> x",
        "<|beg", "▁", "▁▁a", "'s", "'LL", "\ufffd", "\u0000", "~", "0", "007", "x" * 40, "ß", "ſ", "Σς", "ﷺ", "𝔘𝔫𝔦", "\U0010ffff",
        "\ud7ff", "👨‍👩‍👧‍👦", "e\u0301\u0323", "가", "각", "ก็", "ﬀ", "Ⅻ", "…", "—", "«»", "€", "`", "\\", "\"", "/*", "*/", "->", "http://a.b/c?d=e#f"]
    out = ["", " ", "a", "\n"] + TEXT + parts
    while len(out) < 2100:
        joiner = rng.choice(["", "", " ", " ", "\n", "  "])
        out.append(joiner.join(rng.choice(parts) for _ in range(rng.randint(1, 9))))
    for _ in range(200):  # any characters
        out.append("".join(chr(rng.choice([rng.randrange(0, 0x250), rng.randrange(0x250, 0xd800),
                                           rng.randrange(0xe000, 0x110000)])) for _ in range(rng.randint(1, 20))))
    return list(dict.fromkeys(out))


def main():
    texts = strings()
    DATA.mkdir(exist_ok=True)
    (DATA / "strings.json").write_text(json.dumps(texts), encoding="utf-8")
    kinds = {name: byte_level(name) for name in ("gpt2", "roberta", "llama3", "qwen2", "gpt-oss", "deepseek", "digits")}
    kinds |= {name: sentencepiece(name) for name in ("llama2", "mistral", "metaspace", "gemma")}
    kinds["tiny"] = Tokenizer.from_file(str(TOP / "models/tiny/tokenizer.json"))
    for name, tokenizer in kinds.items():
        folder = DATA / name
        folder.mkdir(exist_ok=True)
        if name != "tiny":
            add_tokens(tokenizer, name)
            (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        around = tokenizer.encode("").ids
        prefix, suffix = around[:1], around[1:]
        golden = {"prefix": prefix, "suffix": suffix, "cases": []}
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text).ids == prefix + ids + suffix
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            golden["cases"].append([ids] if decoded == text else [ids, decoded])
        (folder / "golden.json").write_text(json.dumps(golden, separators=(",", ":")), encoding="utf-8")
    print(len(texts), "strings,", len(kinds), "tokenizers", file=sys.stderr)


if __name__ == "__main__":
    main()
