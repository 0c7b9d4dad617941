"""The tokenizer of the scene world's words."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
)

from experiments.scenes import vocabulary


def build_tokenizer(world: str = "plain") -> PreTrainedTokenizerFast:
    """One token a word of the world, lower case, punctuation dropped, `</s>` at the end."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary(world)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z]+"), behavior="removed")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
