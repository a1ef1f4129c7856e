#!/usr/bin/env python3
"""check_loglikelihoods.py MODEL_DIR SAMPLES.jsonl: lm_eval's log-likelihoods against those of transformers in float32.

SAMPLES: what `lm_eval run --log_samples` left. Needs torch and transformers. Prints the largest difference; fails above
1e-3 (natural log, of a whole continuation).
"""

import json
import sys

import torch
import transformers

LIMIT = 1e-3


def main():
    folder, samples = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst, count, greedy_differs = 0.0, 0, 0
    for line in open(samples, encoding="utf-8"):
        sample = json.loads(line)
        for arguments, response in zip(sample["arguments"].values(), sample["resps"]):
            value, greedy = response[0]
            begin = tokenizer.encode(arguments["arg_0"], add_special_tokens=False)
            ids = tokenizer.encode(arguments["arg_0"] + arguments["arg_1"], add_special_tokens=False)
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
            targets = ids[1:]
            ends = range(len(begin) - 1, len(targets))
            expected = sum(logprobs[i, targets[i]].item() for i in ends)
            is_greedy = all(logprobs[i].argmax().item() == targets[i] for i in ends)
            worst = max(worst, abs(expected - float(value)))
            greedy_differs += is_greedy != (str(greedy) == "True")
            count += 1
    print(f"{count} log-likelihoods, largest difference {worst:.2e}, {greedy_differs} differ in whether greedy")
    sys.exit(count == 0 or worst > LIMIT or greedy_differs > 0)


if __name__ == "__main__":
    main()
