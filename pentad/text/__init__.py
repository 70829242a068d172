"""Text <-> token ids: tokenizers, chat templates, incremental detokenizing, in this one place."""

from pentad.errors import BadInput
from pentad.text.detokenizer import Detokenizer
from pentad.text.tokenizer import Source, Tokenizer, refusing

__all__ = ["Detokenizer", "Source", "Tokenizer", "load"]


def load(checkpoint: Source, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer that lies in or beside a checkpoint; None where it has none.

    `vocab_size`: how many rows the network's embedding has. Fewer ids than rows are usual
    (embeddings are padded); for one id more the network has no vector.

    Raises `BadInput` where the files are there but broken, of a kind that pentad can't read, or
    don't fit the embedding.
    """
    with refusing(f"{checkpoint.path}: its tokenizer can't be read"):
        if checkpoint.format == "gguf":
            from pentad.text import gguf_vocab

            tokenizer = gguf_vocab.load(checkpoint.config)
        else:
            from pentad.text import folder_vocab

            tokenizer = folder_vocab.load(checkpoint)
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise BadInput(
            f"{checkpoint.path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding only {vocab_size} rows: "
            "they are not of the same model"
        )
    return tokenizer
