"""Convert between text and token ids: tokenizers, chat templates and incremental detokenization."""

from pentad.errors import BadInput
from pentad.text.detokenizer import Detokenizer
from pentad.text.files import refusing
from pentad.text.tokenizer import Source, Tokenizer

__all__ = ["Detokenizer", "Source", "Tokenizer", "load"]


def load(checkpoint: Source, vocab_size: int | None = None) -> Tokenizer | None:
    """Load a checkpoint's tokenizer.

    Args:
        checkpoint: a GGUF file with the vocabulary in its metadata, or a folder with the tokenizer's files.
        vocab_size: the number of rows of the embedding. The vocabulary may be smaller, but not larger.

    Returns:
        The tokenizer, or None if the checkpoint has none.

    Raises:
        BadInput: the files are broken, have a format that pentad can't read, or don't fit the embedding.
    """
    with refusing(f"{checkpoint.path}: its tokenizer can't be read"):
        if checkpoint.format == "gguf":
            from pentad.text import gguf_vocab

            tokenizer = gguf_vocab.load(checkpoint.config)
        else:
            from pentad.text import folder_vocab

            tokenizer = folder_vocab.load(checkpoint)
    if tokenizer is not None and vocab_size is not None:
        unused = sum(i >= vocab_size for i in tokenizer.control.values())  # such as a pad token
        if tokenizer.vocab_size - unused > vocab_size:
            raise BadInput(
                f"{checkpoint.path}: its tokenizer has {tokenizer.vocab_size} ids, but its embedding {vocab_size} rows;"
                " use the tokenizer and the weights of one model"
            )
    return tokenizer
