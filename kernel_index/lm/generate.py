"""Continue a prompt with a trained model."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import torch

from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import START
from kernel_index.lm.model import LanguageModel


def load_model(path: Path) -> LanguageModel:
    """The model of a checkpoint or run folder, ready to generate."""
    saved = ckpt.read(path)
    try:
        config = ModelConfig.from_json(saved.state["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ckpt.CheckpointError(f"{path} must hold a model configuration: {error}") from error
    model = LanguageModel(config)
    ckpt.load_model(model, saved)
    return model.eval()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` as text, as soon as its bytes form characters.

    The model sees the latest tokens, ``context`` of them at most: when they are that many, the older half is dropped.

    Args:
        model: a trained model.
        prompt: any text.
        tokens: bytes to generate at most; a start-of-document token ends the text earlier.
        temperature: 0 takes the most likely byte.
        top_k: sample among this many most likely bytes.
        seed: of the sampling.
        use_cache: keep keys and values of the tokens seen, in pages; without it every step computes them anew.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    generator = torch.Generator().manual_seed(seed)
    history = [START, *prompt.encode()]
    reader = _CachedReader(model) if use_cache else _PlainReader(model)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for _ in range(tokens):
        logits = reader.next_logits(history)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            best = torch.topk(logits, min(top_k, logits.numel()))
            picked = torch.multinomial(torch.softmax(best.values / temperature, -1), 1, generator=generator)
            token = int(best.indices[picked])
        if token == START:
            break
        history.append(token)
        yield decoder.decode(bytes([token]))
    yield decoder.decode(b"", final=True)


def window_start(count: int, context: int) -> int:
    """The first of ``count`` tokens that the model sees: it moves by half a context at a time."""
    half = max(1, context // 2)
    return 0 if count <= context else -(-(count - context) // half) * half


class _PlainReader:
    """Computes all tokens anew for every next one, in a row of one length, so that the same backends run each time."""

    def __init__(self, model: LanguageModel):
        self.model = model

    def next_logits(self, history: list[int]) -> torch.Tensor:
        start = window_start(len(history), self.model.config.context)
        return self.model.next_logits(torch.tensor(history[start:]))


class _CachedReader:
    """Feeds the model only what it has not seen; when the window moves, it begins with a new sequence of pages."""

    def __init__(self, model: LanguageModel):
        self.model, self.start = model, 0
        self.cache = model.new_cache(model.config.context)
        self.sequence = self.cache.allocate()

    def next_logits(self, history: list[int]) -> torch.Tensor:
        start = window_start(len(history), self.model.config.context)
        if start != self.start:
            self.cache.free(self.sequence)
            self.sequence, self.start = self.cache.allocate(), start
        seen = self.cache.length(self.sequence)
        new = torch.tensor([history[start + seen :]])
        self.cache.begin([self.sequence], new.shape[1])
        logits = self.model.decode(new, seen, self.cache)[0]
        self.cache.advance()
        return logits
