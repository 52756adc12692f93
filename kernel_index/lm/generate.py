"""Generate text with a trained model."""

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm.config import ModelConfig
from kernel_index.lm.data import START
from kernel_index.lm.model import LanguageModel


def load_model(path: Path) -> LanguageModel:
    """The model of a checkpoint or run folder, ready to generate."""
    saved = ckpt.read(path)
    try:
        config = ModelConfig.from_json(saved.state["config"]["model"])
        with torch.device("meta"):  # the configuration is compared with the tensors before any memory is allocated
            claimed = LanguageModel(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ckpt.CheckpointError(f"{path} must hold a model configuration: {error}") from error
    ckpt.check_model(claimed, saved)
    model = LanguageModel(config)
    ckpt.load_model(model, saved)
    return model.eval()


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    ``temperature`` 0 takes the most likely token.  ``top_k`` keeps that many of the most likely tokens; ``top_p`` keeps
    as few of them as hold that share of the probability.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0

    def __post_init__(self):
        checks.is_real("temperature", self.temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        checks.is_int("top_k", self.top_k, minimum=1)
        checks.is_real("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        tokens, p = self.kept(logits)
        return int(tokens[torch.multinomial(p, 1, generator=generator)])

    def kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn, by falling logit, the smaller first among equals, and their relative weights.

        ``ki.token_stats`` has the same rule.
        """
        best, tokens = (x[: self.top_k] for x in logits.cpu().sort(descending=True, stable=True))
        below = best.double() - best[0]  # 0 for the best, which stays finite at any temperature
        p = torch.softmax(below / self.temperature, -1).float()
        if self.top_p < 1:
            count = int((p.cumsum(-1) - p < self.top_p).sum().clamp(min=1))
            tokens, p = tokens[:count], p[:count]
        return tokens, p


def generate(
    model: LanguageModel,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` as text, as soon as the bytes form characters.

    The model sees the latest ``context`` tokens at most: when there are more, the older half is dropped.  A model in
    training mode is put into evaluation mode for each token and back after it; only one thread at a time may then
    generate with it.

    Args:
        model: a trained model.
        prompt: any text.
        tokens: bytes to generate at most; a start-of-document token ends the text earlier.
        temperature: 0 takes the most likely byte.
        top_k: sample among this many most likely bytes.
        top_p: sample among the most likely bytes that hold this share of the probability.
        seed: seed of the sampling.
        use_cache: keep keys, values and states of the tokens seen; without it every step computes them again.
    """
    sampling = Sampling(temperature, top_k, top_p)
    return (text for (text,) in generate_batch(model, [prompt], tokens, sampling, seed=seed, use_cache=use_cache))


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[list[str]]:
    """Continue prompts of any lengths together; yields the new text of each, empty once it has ended.

    Row i draws from ``seed + i``: its text does not depend on the other rows, up to rounding.
    """
    generators, histories = _begun(prompts, tokens, seed)
    return _continued(model, histories, tokens, sampling or Sampling(), generators, use_cache)


def _begun(prompts: Sequence[str], tokens: int, seed: int) -> tuple[list[torch.Generator], list[list[int]]]:
    """The generator and the tokens of each prompt."""
    checks.is_int("tokens", tokens, minimum=0)
    checks.is_int("seed", seed)
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of texts, got one text {prompts!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be texts, got one of type {type(prompt).__name__}")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return generators, [[START, *prompt.encode()] for prompt in prompts]


class Rollout(NamedTuple):
    """What ``rollout`` returns: of each prompt its continuation, one entry a prompt.

    ``tokens`` int64 [n], the last one START where the text ended early; ``texts`` are the tokens as text.
    ``log_probs`` float32 [n] are those of the model, as ``LanguageModel.log_probs`` has them; ``sampled_log_probs``
    [n] those of the distribution that was sampled: with temperature, top-k and top-p.
    """

    tokens: tuple[Tensor, ...]
    texts: tuple[str, ...]
    log_probs: tuple[Tensor, ...]
    sampled_log_probs: tuple[Tensor, ...]


@torch.no_grad()
def rollout(
    model: LanguageModel, prompts: Sequence[str], tokens: int, sampling: Sampling | None = None, *, seed: int = 0
) -> Rollout:
    """Continue prompts together, with the log-probability of every token that was drawn.

    Row i draws from ``seed + i``.  Under ``ki.numerics("invariant")`` the log-probabilities have the bits that
    ``LanguageModel.log_probs`` has for the same tokens, and a row does not depend on the others.

    Args:
        model: a trained model, in evaluation or in training mode.
        prompts: any texts.
        tokens: tokens to draw at most; START ends a row earlier.
        sampling: how tokens are drawn.
        seed: seed of the sampling.

    Raises:
        TypeError, ValueError: as ``generate_batch``; or a prompt and its tokens are longer than the model's context.
        Ineligible: under ``ki.numerics("invariant")``, the model has a layer without an invariant form.
    """
    sampling = sampling or Sampling()
    generators, histories = _begun(prompts, tokens, seed)
    context = model.config.context
    longest = max(map(len, histories))
    if longest > context:
        raise ValueError(f"prompts must be shorter than the context of {context}, got one of {longest} with START")
    if longest + tokens > context:
        room = f"START, the longest prompt and the new tokens must fit into the context of {context}"
        raise ValueError(f"tokens must be at most {context - longest}: {room}, got {tokens}")
    starts = [len(history) for history in histories]
    found: list[list[Tensor]] = [[] for _ in histories]
    reader, live = _CachedReader(model, len(histories)), set(range(len(histories)))
    for _ in range(tokens):
        with _evaluating(model):
            hidden = reader.next_hidden({row: histories[row] for row in sorted(live)})
            for row, state in hidden.items():
                token = sampling.draw(model.logits(state), generators[row])
                histories[row].append(token)
                found[row].append(_log_probs(model, state, token, sampling))
        live = {row for row in live if histories[row][-1] != START}
        if not live:
            break
    drawn = [history[start:] for history, start in zip(histories, starts, strict=True)]
    texts = (bytes(t for t in row if t < START).decode(errors="replace") for row in drawn)
    both = [torch.stack(row) if row else torch.zeros(0, 2) for row in found]
    log_probs, sampled = (tuple(x[:, i].contiguous() for x in both) for i in range(2))
    return Rollout(tuple(torch.tensor(row, dtype=torch.int64) for row in drawn), tuple(texts), log_probs, sampled)


def _log_probs(model: LanguageModel, hidden_C: Tensor, token: int, sampling: Sampling) -> Tensor:
    """Log-probability of a token, and that of the sampler's draw [2]."""
    target = torch.tensor([token], device=hidden_C.device)
    own = model.log_probs_of(hidden_C[None], target)
    if sampling.temperature == 0:
        return torch.cat((own, torch.zeros_like(own)))
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    weight, vocab = model.head.weight, model.config.vocab
    stats = ki.token_stats(hidden_C[None], weight, target, valid_vocab=vocab, **options)
    sampled = (stats.log_prob - stats.log_support).clamp(max=0)  # their roundings apart may leave a few units above 0
    return torch.cat((own, sampled))


@torch.inference_mode()
def _continued(
    model: LanguageModel,
    histories: list[list[int]],
    tokens: int,
    sampling: Sampling,
    generators: list[torch.Generator],
    use_cache: bool,
) -> Iterator[list[str]]:
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in histories]
    reader = _CachedReader(model, len(histories)) if use_cache else _PlainReader(model)
    live = set(range(len(histories)))
    for _ in range(tokens):
        texts = [""] * len(histories)
        with _evaluating(model):
            found = reader.next_logits({row: histories[row] for row in sorted(live)})
        for row, logits in found.items():
            token = sampling.draw(logits, generators[row])
            if token == START:
                live.discard(row)
                texts[row] = decoders[row].decode(b"", final=True)
            else:
                histories[row].append(token)
                texts[row] = decoders[row].decode(bytes([token]))
        yield texts
        if not live:
            return
    yield [decoders[row].decode(b"", final=True) if row in live else "" for row in range(len(histories))]


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode for every module of the model, and each module's own mode again afterwards."""
    training = [m for m in model.modules() if m.training] if model.training else []  # found once
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def window_start(count: int, context: int) -> int:
    """The first of ``count`` tokens that the model sees: it moves by half a context at a time."""
    half = max(1, context // 2)
    return 0 if count <= context else -(-(count - context) // half) * half


class _PlainReader:
    """Computes all tokens again for every next one, in rows of fixed length, so that the same backends run."""

    def __init__(self, model: LanguageModel):
        self.model = model

    def next_logits(self, histories: dict[int, list[int]]) -> dict[int, Tensor]:
        context = self.model.config.context
        return {
            row: self.model.next_logits(torch.tensor(history[window_start(len(history), context) :]))
            for row, history in histories.items()
        }


class _CachedReader:
    """Gives the model only the tokens it has not seen; a row whose window moves begins a new sequence."""

    def __init__(self, model: LanguageModel, rows: int):
        self.model, self.device = model, model.head.weight.device
        page = 16
        self.cache = model.new_cache(rows * -(-model.config.context // page) * page, page)
        self.starts = [0] * rows
        self.sequences = [self.cache.allocate() for _ in range(rows)]

    def next_logits(self, histories: dict[int, list[int]]) -> dict[int, Tensor]:
        return {
            row: logits
            for rows, hidden in self._last_hidden(histories)
            for row, logits in zip(rows, self.model.logits(hidden), strict=True)
        }

    def next_hidden(self, histories: dict[int, list[int]]) -> dict[int, Tensor]:
        """The final hidden state [C] after each history."""
        return {
            row: state for rows, hidden in self._last_hidden(histories) for row, state in zip(rows, hidden, strict=True)
        }

    def _last_hidden(self, histories: dict[int, list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        new = {row: self._unseen(row, history) for row, history in histories.items()}
        # Rows with one new token are not padded to the length of those that read a prompt.
        for rows in ([r for r in new if len(new[r]) == 1], [r for r in new if len(new[r]) > 1]):
            if rows:
                yield rows, self._read(rows, [new[r] for r in rows])

    def _unseen(self, row: int, history: list[int]) -> list[int]:
        start = window_start(len(history), self.model.config.context)
        if start != self.starts[row]:
            self.cache.free(self.sequences[row])
            self.sequences[row], self.starts[row] = self.cache.allocate(), start
        return history[start + self.cache.length(self.sequences[row]) :]

    def _read(self, rows: list[int], new: list[list[int]]) -> Tensor:
        sequences, counts = [self.sequences[row] for row in rows], [len(n) for n in new]
        longest = max(counts)
        ragged = None if min(counts) == longest else counts
        self.cache.begin(sequences, longest, ragged)
        padded = torch.tensor([n + [START] * (longest - len(n)) for n in new], device=self.device)
        at = torch.tensor([self.cache.length(s) for s in sequences], device=self.device)
        real = None if ragged is None else torch.tensor(counts, device=self.device)
        hidden = self.model.cached_hidden(padded, at, self.cache)
        self.cache.advance()
        return hidden[:, -1] if real is None else hidden[torch.arange(len(rows), device=self.device), real - 1]
