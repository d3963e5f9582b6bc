"""Start one real engine, generate greedily for given token ids, and print tokens and log-probabilities as JSON.

Run as a program: vLLM starts processes of its own, and one engine's state must not meet another's.
"""

import argparse
import json

PROMPTS = [[5, 9, 17, 33, 65, 129], [7, 11], list(range(3, 43)), [200, 100, 50, 25, 12, 6, 3, 251]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--arguments", default="{}", help="further arguments of vllm.LLM as JSON")
    parser.add_argument("--reload", help="a checkpoint whose weights are loaded in place after the first request")
    given = parser.parse_args()

    from vllm import LLM, SamplingParams

    defaults = dict(
        model=given.model, skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=64,
        enable_prefix_caching=False, max_num_seqs=8, seed=0,
    )  # fmt: skip
    engine = LLM(**{**defaults, **json.loads(given.arguments)})
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=4, detokenize=False, ignore_eos=True)
    results = [answers(engine, sampling)]
    if given.reload:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": given.reload})
        results.append(answers(engine, sampling))
    with open(given.out, "w") as file:
        json.dump(results, file)


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
