"""Text in and out of a model: tokenizers, the streaming detokenizer, stop strings.

Chat templates are in `chandra.text.template`, imported where a chat is rendered: Jinja takes 7 MB.
"""

from chandra.text.detokenizer import StopMatcher, StreamDetokenizer
from chandra.text.sources import load_tokenizer
from chandra.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "StreamDetokenizer", "Tokenizer", "load_tokenizer"]
