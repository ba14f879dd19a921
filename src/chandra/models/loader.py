"""From a checkpoint to a `Decoder`: tensor by tensor, every byte reserved before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from chandra.checkpoint.base import Checkpoint
from chandra.memory.ledger import Kind, Ledger
from chandra.models.decoder import FLOAT, Decoder
from chandra.models.mover import Mover
from chandra.models.spec import ModelSpec
from chandra.models.tensors import Source, find_sources
from chandra.models.weight_stream import MappedHead, MappedStream, lookup_bytes, piece_rows
from chandra.models.weights import EMBEDDING, HEAD, HOST, Backends, Weights
from chandra.ops.contracts import Linear
from chandra.quant import get_format


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    backends: Backends,
    ledger: Ledger,
    *,
    context_length: int,
    max_rows: int,
    max_logit_rows: int,
    micro_rows: int = 0,
    formats: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load a model for contexts of up to `context_length` tokens and batches of up to `max_rows` tokens, which pass
    through several devices in parts of at least `micro_rows` (0: as a whole).

    `formats` names the format for those tensors of the table that are to be converted; `progress` is told the bytes
    done and in all. Raises CheckpointError for tensors that are missing, misshapen or not finite, BudgetExceeded if a
    device has no room; nothing stays reserved then.
    """
    sources = find_sources(spec, checkpoint)
    wanted = stored_formats(sources, checkpoint) | dict(formats or {})
    forms = {source: get_format(wanted[source.tensor.name]) for source in sources}
    weights = Weights(checkpoint, spec, backends, ledger, context_length, forms)
    mover, loaded = Mover(weights), weights.builder.loaded
    total, done = sum(form.nbytes(source.tensor.shape) for source, form in forms.items()), 0
    try:
        for source in sorted(sources, key=weights.passing_bytes, reverse=True):  # the most first, while there is room
            with ledger.reserve(HOST, Kind.LOADING, weights.passing_bytes(source)):
                mover.load(source)
            done += forms[source].nbytes(source.tensor.shape)
            if progress:
                progress(done, total)
        mover.start()
        _map_rows(mover, max_rows)
        norm = weights.builder.norm("model.norm")
        head = _map_head(weights, max_logit_rows) or Linear(loaded.get(HEAD, loaded[EMBEDDING]))
        limits = max_rows, max_logit_rows, micro_rows
        return Decoder(spec, backends, loaded[EMBEDDING], norm, head, ledger, mover, *limits)
    except BaseException:
        mover.release()
        raise


def stored_formats(sources: Iterable[Source], checkpoint: Checkpoint) -> dict[str, str]:
    """The format in which each tensor of the table is loaded, if it is not converted."""
    return {
        source.tensor.name: checkpoint.tensors[source.names[0]].format if source.tensor.packable else "F32"
        for source in sources
    }


def _map_rows(mover: Mover, max_rows: int) -> None:
    """Look the rows of the embedding up in the file, if they stay there."""
    weights = mover.weights
    source = next(source for source in weights.forms if source.tensor.name == EMBEDDING)
    if weights.stays(source):
        weights.builder.loaded[EMBEDDING] = weight = weights.in_file(source)
        weights.reserve(HOST, Kind.STAGING, lookup_bytes(max_rows, weight.nbytes))
        mover.lookup = source


def _map_head(weights: Weights, max_logit_rows: int) -> MappedHead | None:
    """The head, if it is computed from the file."""
    if weights.backends.placements.get("head") != "disk":
        return None
    checkpoint, wanted = weights.checkpoint, EMBEDDING if weights.spec.tied_embeddings else HEAD
    source = next(source for source in weights.forms if source.tensor.name == wanted)
    name, rows = source.names[0], source.tensor.shape[0]
    step, nbytes = piece_rows(rows), checkpoint.tensors[source.names[0]].nbytes // rows
    weights.reserve(HOST, Kind.STAGING, min(MappedStream.HELD * step, rows) * nbytes + FLOAT * max_logit_rows * step)

    def place(i: int) -> tuple[str, int, int]:
        return name, i * step * nbytes, min((i + 1) * step, rows) * nbytes

    pieces = MappedStream[Linear](lambda i: checkpoint.prefetch(*place(i)), lambda i: checkpoint.release(*place(i)))
    for i, start in enumerate(range(0, rows, step)):
        pieces.items[i] = Linear(weights.in_file(source, (start, min(start + step, rows))))
    return MappedHead(pieces, step, weights.backends.head.empty((max_logit_rows * step,), "float32"))
