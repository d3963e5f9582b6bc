"""Start one real engine, generate greedily for given token ids, and print tokens and log-probabilities as JSON.

Run as a program: vLLM starts processes of its own, and one engine's state must not meet another's.
"""

import argparse
import json
from functools import partial

PROMPTS = [[5, 9, 17, 33, 65, 129], [7, 11], list(range(3, 43)), [200, 100, 50, 25, 12, 6, 3, 251]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--arguments", default="{}", help="further arguments of vllm.LLM as JSON")
    parser.add_argument("--scale", type=float, help="multiply every parameter in place after the first requests")
    given = parser.parse_args()

    from vllm import LLM, SamplingParams

    defaults = dict(
        model=given.model, skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=64,
        enable_prefix_caching=False, max_num_seqs=8, seed=0,
    )  # fmt: skip
    engine = LLM(**{**defaults, **json.loads(given.arguments)})
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=4, detokenize=False, ignore_eos=True)
    results = [answers(engine, sampling)]
    if given.scale:
        engine.apply_model(partial(scale, factor=given.scale))
        results.append(answers(engine, sampling))
    with open(given.out, "w") as file:
        json.dump(results, file)


def scale(model, factor):
    """What a trainer does between two steps of its rollout: new values in the old storages."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def answers(engine, sampling):
    """Per prompt: the tokens, and for each token the log-probabilities by token id."""
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    made = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)]
    return [
        {"tokens": list(m.token_ids), "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in m.logprobs]}
        for m in made
    ]


if __name__ == "__main__":
    main()
