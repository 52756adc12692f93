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
    model: LanguageModel, prompt: str, tokens: int, *, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` as text, as soon as its bytes form characters.

    Every step runs the whole context, padded to one length, so that each token is computed by the same backends.

    Args:
        model: a trained model.
        prompt: any text; the last ``context`` bytes of it count.
        tokens: bytes to generate at most; a start-of-document token ends the text earlier.
        temperature: 0 takes the most likely byte.
        top_k: sample among this many most likely bytes.
        seed: of the sampling.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    context = model.config.context
    generator = torch.Generator().manual_seed(seed)
    history = [START, *prompt.encode()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for _ in range(tokens):
        logits = model.next_logits(torch.tensor(history[-context:]))
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
