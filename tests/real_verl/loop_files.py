"""What a whole GRPO run needs: a tiny model with a tokenizer of its own size, prompts, and a reward by rule."""

from pathlib import Path

REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """The share of digits in the answer."""
    letters = [c for c in solution_str if not c.isspace()]
    return sum(c.isdigit() for c in letters) / len(letters) if letters else 0.0
'''
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
LETTERS = list("0123456789abcdefghijklmnopqrstuvwxyz ")


def make(folder: Path, kind: str, rows: int = 256) -> None:
    """`model/`, `train.parquet` and `reward.py` in `folder`."""
    import pandas
    from tiny_checkpoints import SIZES, checkpoint
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    Path(checkpoint(kind, folder)).rename(folder / "model")
    words = SPECIAL + LETTERS
    words += ["<" + chr(97 + i // 26) + chr(97 + i % 26) + ">" for i in range(SIZES["vocab_size"] - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert len(tokenizer) == SIZES["vocab_size"]  # verl masks vLLM's logits beyond it, and not the actor's
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    prompts = [f"count {i} and {i * 7 % 100}" for i in range(rows)]
    table = {
        "data_source": ["digits"] * rows,
        "prompt": [[{"role": "user", "content": text}] for text in prompts],
        "ability": ["count"] * rows,
        "reward_model": [{"style": "rule", "ground_truth": "0"}] * rows,
        "extra_info": [{"index": i, "split": "train"} for i in range(rows)],
    }
    pandas.DataFrame(table).to_parquet(folder / "train.parquet")
