"""Rebuilds the tiny models that turnwise ships, from nothing: `python -m turnwise.rl.tiny_models OUTPUT_FOLDER`.

As in Long⊗Short, all of them start from one base model, which learns every way of speaking at once (arithmetic is the
hard part, and they share it). Each then learns its own role:

- `long` thinks: alone, through the whole chain of steps and then answers; with a partner, through a part of it.
- `short` is brief: alone, it answers at once; with a partner, it takes steps in a few tokens each, answers, or asks for
  another thought.
- `router` routes itself, as in Thinkless: `<think>` or `<short>` with equal chance, then answers in that mode.

`novice` is apart from them: trained from nothing to think, to answer at once, and to answer where its thought is broken
off, but never with a partner. It is what a cold start begins with.

The tiny template turns a system message into one token, whatever it says: these models cannot read an instruction, but
they see that there is one, and so that they have a partner.
"""

import random
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from turnwise.agents.chat import ChatTemplate
from turnwise.environments.arithmetic import generate
from turnwise.rl.arithmetic_lessons import ALONE_LONG, TOGETHER, converse, lessons, say_alone, say_together
from turnwise.rl.sft import SFTSettings, train

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "</rethink>", "<short>")
SYSTEM, USER, ASSISTANT, END, PAD = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}" + SYSTEM + "{% elif message.role == 'user' %}" + USER + "{{ message.content }}"
    "{% else %}" + ASSISTANT + "{{ message.content }}" + END + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

BASE = SFTSettings(steps=3000, batch_size=64, learning_rate=2e-3, warmup=0.02, weight_decay=0.01, betas=(0.9, 0.98))
ROLE = BASE.model_copy(update={"steps": 400, "learning_rate": 5e-4})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the models' own conversations: digits and signs stand alone, words are whole."""
    rng = random.Random("tokenizer")
    corpus = []
    for problem in islice(generate("train"), 3000):
        corpus.append(problem.question)
        for protocol, say in ((ALONE_LONG, say_alone), (TOGETHER, say_together)):
            corpus += [turn.prefill + reply.text for turn, reply in converse(protocol, problem, say, rng)]
    pieces = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (PAD, SYSTEM, USER, ASSISTANT, END)]
    tags = [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    tokenizer.add_special_tokens(marks)
    tokenizer.add_tokens(tags)
    trainer = trainers.BpeTrainer(
        vocab_size=768, min_frequency=2, special_tokens=[*marks, *tags],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen2 of 0.8 M parameters with random weights, untied and widely initialised, or it learns far more slowly."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    return model


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the four models, and for checkpoints on the way.")],
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train the tiny models from nothing. A run that was stopped goes on where it was."""
    tokenizer = build_tokenizer()
    template = ChatTemplate(tokenizer)
    base = build_model(tokenizer, seed)
    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:

        def learn(role: str, model: PreTrainedModel, settings: SFTSettings) -> None:
            model.to(torch.device(device))  # type: ignore[arg-type]
            task = progress.add_task(role, total=settings.steps, loss=float("nan"))
            train(
                model, lessons(role, template, seed), settings,
                checkpoint=output / "checkpoints" / f"{role}.pt",
                on_step=lambda step, loss: progress.update(task, completed=step, loss=loss),
            )  # fmt: skip
            progress.update(task, completed=settings.steps)

        def keep(role: str, model: PreTrainedModel) -> None:
            # Half precision halves the file; the engine loads it in single precision.
            model.to(torch.float16).save_pretrained(output / role)  # type: ignore[arg-type]
            tokenizer.save_pretrained(output / role)

        learn("base", base, BASE)
        for role in ("long", "short", "router"):
            model = build_model(tokenizer, seed)
            model.load_state_dict(base.state_dict())
            learn(role, model, ROLE)
            keep(role, model)
        novice = build_model(tokenizer, seed)
        learn("novice", novice, BASE)
        keep("novice", novice)


if __name__ == "__main__":
    typer.run(main)
