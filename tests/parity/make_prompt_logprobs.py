"""Writes prompt_logprobs.jsonl: what Hugging Face transformers in float32 on a CPU says of the tokens of each prompt of
models/tiny/golden/prompts.jsonl. Per line: name; logprobs [tokens - 1], entry i of token i + 1 given those before it; of
prompts up to 100 tokens also the most likely ones in its place, top_ids and top_logprobs [tokens - 1, 3]. near_tie: the
first position at which a router's second and third choice are closer than 1e-5, where another order of summation may take
the other expert; -1: none.

    python tests/parity/make_prompt_logprobs.py     (torch 1.13.1, transformers 4.38.2)
"""

import json
import pathlib

import torch
from transformers import MixtralForCausalLM

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent.parent / "models" / "tiny"
TOP = 3
TOP_UP_TO = 100
NEAR_TIE = 1e-5


def rounded(values):
    return [round(v, 5) for v in values]


def near_tie(router_logits):
    best = [torch.topk(layer, 3, dim=-1).values for layer in router_logits]
    gaps = torch.stack([layer[:, 1] - layer[:, 2] for layer in best]).min(dim=0).values
    return next((i for i, gap in enumerate(gaps.tolist()) if gap < NEAR_TIE), -1)


def main():
    model = MixtralForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
    model.eval()
    with open(HERE / "prompt_logprobs.jsonl", "w", encoding="utf-8") as out:
        for line in (MODEL / "golden" / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
            case = json.loads(line)
            ids = torch.tensor(case["ids"])
            with torch.no_grad():
                result = model(ids[None], output_router_logits=True)
            logprobs = torch.log_softmax(result.logits[0, :-1].double(), dim=-1)
            golden = {"name": case["name"], "near_tie": near_tie(result.router_logits),
                      "logprobs": rounded(logprobs.gather(1, ids[1:, None])[:, 0].tolist())}
            if len(ids) <= TOP_UP_TO:
                top = torch.topk(logprobs, TOP, dim=-1)
                golden["top_ids"] = top.indices.tolist()
                golden["top_logprobs"] = [rounded(row) for row in top.values.tolist()]
            out.write(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
