"""Start real engines one after the other, generate greedily for given token ids, and write what they said as JSON.

Run as a program: vLLM starts processes of its own (with --processes; else the engines live in this one, which is
faster), and its platform is chosen once a process.
"""

import argparse
import json
import os
from functools import partial

PROMPTS = [[5, 9, 17, 33, 65, 129], [7, 11], list(range(3, 43)), [200, 100, 50, 25, 12, 6, 3, 251]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--runs", required=True, help='JSON: [{"arguments": of vllm.LLM, "environment": variables}]')
    parser.add_argument("--scale", type=float, help="multiply every parameter in place after the first requests")
    parser.add_argument("--processes", action="store_true", help="an engine core and workers of their own")
    given = parser.parse_args()
    if not given.processes:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    made = []
    for run in json.loads(given.runs):
        os.environ.update(run.get("environment", {}))
        made.append(results(given, run["arguments"]))
        for name in run.get("environment", {}):
            del os.environ[name]
        with open(given.out, "w") as file:
            json.dump(made, file)


def results(given, arguments):
    """Of one engine: its answers, and those after its weights have changed."""
    from vllm import LLM, SamplingParams

    defaults = dict(
        model=given.model, skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=64,
        enable_prefix_caching=False, max_num_seqs=8, seed=0, compilation_config={"mode": 3}, disable_log_stats=True,
        distributed_executor_backend="mp" if given.processes else "uni",
    )  # fmt: skip
    engine = LLM(**{**defaults, **arguments})
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=4, detokenize=False, ignore_eos=True)
    made = [answers(engine, sampling)]
    if given.scale:
        engine.apply_model(partial(scale, factor=given.scale))
        made.append(answers(engine, sampling))
    engine.llm_engine.engine_core.shutdown()
    return made


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
