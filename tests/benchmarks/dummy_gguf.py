#!/usr/bin/env python3
"""dummy_gguf.py MODEL_DIR OUT.gguf: random bf16 weights for a Mixtral config.json, as llama.cpp reads them.

For `llama-bench` beside `soloist bench engine --load-format=dummy` on the same config.json. Needs numpy and gguf (PyPI);
there is no vocabulary: llama-bench needs none.
"""

import json
import sys

import gguf
import numpy

BF16 = gguf.GGMLQuantizationType.BF16


def main():
    folder, out = sys.argv[1:]
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    random = numpy.random.default_rng(1)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    experts = config["num_local_experts"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")

    def values(*shape):
        return random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)

    def matrix(name, *shape):
        bits = ((values(*shape).view(numpy.uint32) + 0x8000) >> 16).astype(numpy.uint16)
        writer.add_tensor(f"{name}.weight", bits.view(numpy.uint8).reshape(*shape[:-1], -1), raw_dtype=BF16)

    def norm(name):
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, numpy.float32))

    matrix("token_embd", vocab, hidden)
    matrix("output", vocab, hidden)
    norm("output_norm")
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}."
        norm(block + "attn_norm")
        norm(block + "ffn_norm")
        matrix(block + "attn_q", heads * dim, hidden)
        matrix(block + "attn_k", kv_heads * dim, hidden)
        matrix(block + "attn_v", kv_heads * dim, hidden)
        matrix(block + "attn_output", hidden, heads * dim)
        writer.add_tensor(block + "ffn_gate_inp.weight", values(experts, hidden))
        matrix(block + "ffn_gate_exps", experts, inner, hidden)
        matrix(block + "ffn_up_exps", experts, inner, hidden)
        matrix(block + "ffn_down_exps", experts, hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
