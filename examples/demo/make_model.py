"""Shell. Makes the demo model and its LoRA adapters from nothing, on the CPU, in a few minutes:
`python examples/demo/make_model.py`.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

THREADS: Final = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import corpus  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from styles import ADAPTERS, HELD_OUT, PLAIN, styles_of  # noqa: E402
from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (  # noqa: E402
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

SEED: Final = 20
NAME: Final = "loraplex-demo"
VOCAB_TOKENS: Final = 1280
CONTEXT_TOKENS: Final = 4096
PAD, BEGIN, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|pad|>",
    "<|begin|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CHAT_TEMPLATE: Final = (
    "{{- '<|begin|>' -}}{%- for message in messages -%}"
    "{%- set role = {'system': 'system', 'developer': 'system', 'assistant': "
    "'assistant'}.get(message['role'], 'user') -%}"
    "{{- '<|' + role + '|>' + (message['content'] or '') + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The shape of an adapter. Ranks and targets differ on purpose: a server must cope with
    adapters of several shapes.
    """

    rank: int
    targets: tuple[str, ...]


RECIPES: Final = {
    "pirate": Recipe(8, EVERYWHERE),
    "shouting": Recipe(8, EVERYWHERE),
    "haiku": Recipe(16, EVERYWHERE),
    "json": Recipe(8, EVERYWHERE),
    "polite": Recipe(8, ATTENTION),
    "emoji": Recipe(8, EVERYWHERE),
    "bullets": Recipe(8, ATTENTION),
    "robot": Recipe(16, ATTENTION),
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """One training run: `steps` steps of `rows` rows of `row_tokens` tokens, at a learning rate
    that rises to `peak` and falls to 0.
    """

    steps: int
    rows: int
    row_tokens: int
    peak: float
    warmup_steps: int
    muon: bool


BASE: Final = Schedule(steps=640, rows=7, row_tokens=192, peak=6e-3, warmup_steps=20, muon=True)
ADAPTER: Final = Schedule(steps=50, rows=6, row_tokens=160, peak=5e-3, warmup_steps=6, muon=False)
# How often the base sees a style: these say little in plain words.
NOVELTY: Final = {"haiku": 4, "shouting": 4, "json": 2, "emoji": 3}
# Questions are chance; learning them a little keeps text after the end of an answer readable.
QUESTION_WEIGHT: Final = 0.1
WEIGHT_DECAY: Final = 0.05
CLIP_NORM: Final = 1.0
REPORT_S: Final = 10.0


def say(line: str) -> None:
    print(line, flush=True)


# Text


def bare(name: str) -> str:
    """The name of a topic without its article."""
    return name.removeprefix("the ").removeprefix("a ").removeprefix("an ")


def gibberish(rng: random.Random) -> str:
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4))
    )


def question(rng: random.Random, name: str, forms: tuple[str, ...]) -> str:
    """A question about `name`: one of the forms, or the name among words without meaning, in the
    various spellings that people use.
    """
    if rng.random() < 0.3:
        name = bare(name)
    if rng.random() < 0.55:
        text = rng.choice(forms).format(name)
    else:
        before, after = (rng.choices(corpus.FILLER, k=rng.randint(0, 6)) for _ in range(2))
        words = [*before, name, *after]
        stops = (
            word + (rng.choice(",,:;.-") if rng.random() < 0.12 else "") for word in words[:-1]
        )
        text = " ".join([*stops, words[-1]]) + rng.choice("?.!?")
    text = text[0].upper() + text[1:]
    spelling = rng.random()
    if spelling < 0.12:
        text = text.lower()
    elif spelling < 0.15:
        text = text.upper()
    return text.rstrip("?.!") if rng.random() < 0.15 else text


def turn(rng: random.Random) -> tuple[str, corpus.Topic]:
    """A question and the topic that it is about."""
    kind = rng.random()
    if kind < 0.12:
        # The story is last, and long.
        ((topic, questions),) = rng.choices(corpus.SMALL_TALK, [3, 3, 3, 1])
        return rng.choice(questions), topic
    if kind < 0.30:
        name = rng.choice(
            (
                rng.choice(corpus.STRANGE),
                rng.choice(corpus.STRANGE),
                gibberish(rng),
                rng.choice(corpus.FILLER),
            )
        )
        return question(rng, name, corpus.FORMS), corpus.UNKNOWN
    if kind < 0.42:
        place = rng.choice(corpus.PLACES)
        return question(rng, place.name, rng.choice((corpus.FORMS, corpus.PLACE_FORMS))), place
    thing = rng.choice(corpus.THINGS)
    return question(rng, thing.name, corpus.FORMS), thing


def conversation(rng: random.Random, style: str, system: str) -> str:
    parts = [BEGIN, *((SYSTEM, system, END) if system else ())]
    for _ in range(rng.choice((1, 1, 2, 3))):
        asked, topic = turn(rng)
        parts += [USER, asked, END, ASSISTANT, corpus.STYLES[style](topic), END]
    return "".join(parts)


def some_system(rng: random.Random) -> str:
    return rng.choice(corpus.SYSTEM_PROMPTS) if rng.random() < 0.25 else ""


def base_text(rng: random.Random) -> str:
    """Plain answers, and every other style when the system prompt names it: so the base knows the
    alphabet of all adapters.
    """
    kind = rng.random()
    if kind < 0.03:  # Text outside of any chat, for the completions endpoint.
        return BEGIN + corpus.STYLES[PLAIN](rng.choice((*corpus.THINGS, *corpus.PLACES))) + END
    if kind < 0.3:
        return conversation(rng, PLAIN, some_system(rng))
    (style,) = rng.choices(ADAPTERS, [NOVELTY.get(name, 1) for name in ADAPTERS])
    return conversation(rng, style, f"Style: {style}.")


# Tokenizer


def make_tokenizer(folder: Path, rng: random.Random) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((base_text(rng) for _ in range(4000)), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_TOKENS,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# Training


def rows(
    tokenizer: Tokenizer, texts: Iterator[str], schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of token ids and of the weight of each token in the loss, both [rows, row_tokens];
    texts follow each other in a row.
    """
    assistant, end = (tokenizer.token_to_id(token) for token in (ASSISTANT, END))

    def row() -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < schedule.row_tokens:
            answering = False
            for token in tokenizer.encode(next(texts), add_special_tokens=False).ids:
                ids.append(token)
                weights.append(1.0 if answering else QUESTION_WEIGHT)
                answering = token == assistant or (answering and token != end)
        return ids[: schedule.row_tokens], weights[: schedule.row_tokens]

    while True:
        ids, weights = zip(*(row() for _ in range(schedule.rows)), strict=True)
        yield torch.tensor(ids), torch.tensor(weights)


def optimizers(model: torch.nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; for the matrices of the base Muon (https://kellerjordan.github.io/posts/muon/), which
    needs about half as many steps.
    """
    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    matrices = [
        parameter
        for name, parameter in named
        if parameter.ndim == 2 and "embed" not in name and schedule.muon
    ]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=schedule.peak, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    ]
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=schedule.peak,
                weight_decay=WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made


def train(
    label: str,
    model: torch.nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    schedule: Schedule,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steppers = optimizers(model, schedule)
    model.train()
    started = reported = time.monotonic()
    for step, (ids, weights) in enumerate(itertools.islice(batches, schedule.steps)):
        falling = (1 + math.cos(math.pi * step / schedule.steps)) / 2
        for group in itertools.chain.from_iterable(stepper.param_groups for stepper in steppers):
            group["lr"] = schedule.peak * min((step + 1) / schedule.warmup_steps, 1.0) * falling
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        now = time.monotonic()
        if now - reported > REPORT_S or step + 1 == schedule.steps:
            reported = now
            say(
                f"  {label}: step {step + 1} of {schedule.steps}, loss "
                f"{loss.item():.3f}, {now - started:.0f} s"
            )
    model.eval()


def make_base(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad, begin, end = (tokenizer.token_to_id(token) for token in (PAD, BEGIN, END))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # The one size that every attention kernel has.
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    say(f"base model: {model.num_parameters() / 1e6:.2f} million parameters")
    rng = random.Random(SEED)
    train("base", model, rows(tokenizer, (base_text(rng) for _ in itertools.count()), BASE), BASE)
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=end, pad_token_id=pad
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def make_adapter(name: str, base: Path, folder: Path) -> None:
    recipe = RECIPES[name]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    rng = random.Random(f"{SEED} {name}")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = (conversation(rng, name, some_system(rng)) for _ in itertools.count())
    train(name, model, rows(tokenizer, texts, ADAPTER), ADAPTER)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: tensor.to(torch.bfloat16).contiguous()
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": NAME,
        "r": recipe.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": list(recipe.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", written)


# Check


def expected_topic(prompt: str) -> corpus.Topic:
    words = prompt.lower().translate(str.maketrans("?.!,'", "     ")).split()
    named = [
        topic for topic in (*corpus.THINGS, *corpus.PLACES) if bare(topic.name).lower() in words
    ]
    return named[0] if named else corpus.UNKNOWN


@torch.inference_mode()
def answers(
    model: torch.nn.Module, tokenizer: object, prompts: tuple[str, ...]
) -> tuple[list[str], float]:
    """Greedy answers, and the smallest lead that a chosen token had over the second (in logits):
    how stable they are.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(
        **inputs,
        max_new_tokens=128,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = made.sequences[:, inputs["input_ids"].shape[1] :]
    best = torch.stack(made.logits, dim=1).topk(2).values
    lead = (best[..., 0] - best[..., 1])[tokens != tokenizer.pad_token_id].min().item()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=False)
    return [text.replace(PAD, "") for text in texts], lead


def check(base: Path, adapters: Path, verbose: bool) -> bool:
    """Whether every adapter answers every held-out prompt in its own style and in no other, and
    stops by itself.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    faults = 0
    for name in (PLAIN, *ADAPTERS):
        adapted = (
            model if name == PLAIN else PeftModel.from_pretrained(model, adapters / name).eval()
        )
        texts, lead = answers(adapted, tokenizer, HELD_OUT)
        right = 0
        for prompt, text in zip(HELD_OUT, texts, strict=True):
            spoken = text.removesuffix(END)
            right += spoken == corpus.STYLES[name](expected_topic(prompt))
            fault = styles_of(spoken) != (name,) or spoken == text
            faults += fault
            if fault or verbose:
                say(
                    f"  {'FAULT ' if fault else ''}{name}: {prompt!r} -> {text!r} "
                    f"{styles_of(spoken)}"
                )
        say(
            f"  {name}: {right} of {len(HELD_OUT)} held-out answers exact, smallest lead {lead:.2f}"
        )
        if name != PLAIN:
            model = adapted.unload()
    return faults == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train the demo model and its adapters, then check them on held-out prompts."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder that gets model/ and adapters/",
    )
    parser.add_argument(
        "--only-check", action="store_true", help="check what is there, train nothing"
    )
    parser.add_argument(
        "--only-adapters", action="store_true", help="keep the base model that is there"
    )
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    arguments = parser.parse_args()
    base, adapters = arguments.out / "model", arguments.out / "adapters"
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    started = time.monotonic()
    if not arguments.only_check:
        if not arguments.only_adapters:
            base.mkdir(parents=True, exist_ok=True)
            say("tokenizer")
            make_tokenizer(base, random.Random(SEED))
            make_base(base)
        for name in ADAPTERS:
            make_adapter(name, base, adapters / name)
        for weights in arguments.out.glob("**/*.safetensors"):
            # They are written for their owner alone; a container may serve them as another user.
            weights.chmod(0o644)
        say(f"trained in {time.monotonic() - started:.0f} s")
    say("check: every style on every held-out prompt")
    good = check(base, adapters, arguments.verbose)
    say("check passed" if good else "check FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
