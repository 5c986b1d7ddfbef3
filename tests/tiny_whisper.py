"""Shell. Makes a Whisper with random weights and a tokenizer of bytes. It hears nothing, but it
answers like one, and the same sound gets the same text.

    python -m tests.tiny_whisper FOLDER
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import wave
from pathlib import Path
from typing import Any

SECONDS_PER_MARK, MARKS = 0.02, 1501
"""Whisper's tokens for times, from 0 to 30 s."""
SIZE = 64
RATE_HZ = 16_000


def make_whisper(folder: Path) -> Path:
    """Writes the model into `folder`, in the form of a hub's checkpoint. Returns the folder."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary()
    _save_processor(folder, vocabulary)
    end = vocabulary["<|endoftext|>"]
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    start = {"decoder_start_token_id": vocabulary["<|startoftranscript|>"]}
    layers = {"layers": 1, "attention_heads": 2, "ffn_dim": SIZE}
    sizes = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in layers.items()}
    torch.manual_seed(0)
    config = WhisperConfig(vocab_size=len(vocabulary), d_model=SIZE, **sizes, **ids, **start)
    model: Any = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # what it says is bytes, and no marks
        model.model.decoder.embed_tokens.weight[:256] *= 20
    model.generation_config = GenerationConfig(**ids, **start)
    model.save_pretrained(folder)
    return folder


def _vocabulary() -> dict[str, int]:
    from tokenizers import pre_tokenizers
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    marks = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    times = [f"{n * SECONDS_PER_MARK:.2f}" for n in range(MARKS)]
    special = ["endoftext", "startoftranscript", *LANGUAGES, *marks, *times]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{word}|>" for word in special)]
    return {word: number for number, word in enumerate(words)}


def _save_processor(folder: Path, vocabulary: dict[str, int]) -> None:
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    special = [word for word in vocabulary if word.startswith("<|") and len(word) > 2]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    features = WhisperFeatureExtractor(feature_size=80)
    features.save_pretrained(folder)
    WhisperProcessor(features, tokenizer).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def sound(seconds: float = 1.0, pitch_hz: float = 220.0) -> bytes:
    """A WAV file with one note."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        step = 2 * math.pi * pitch_hz / RATE_HZ
        samples = (int(8000 * math.sin(step * n)) for n in range(int(seconds * RATE_HZ)))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return out.getvalue()


if __name__ == "__main__":
    make_whisper(Path(sys.argv[1]))
