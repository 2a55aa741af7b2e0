#!/usr/bin/env bash
# transformers makes another tokenizer of a GGUF file than the file states where it states "smollm": digits are not split.
#
# transformers 5.23.0 with gguf 0.19.0. `tokenizer.ggml.pre` names how text is split before the merges. llama.cpp
# (src/llama-vocab.cpp) splits off every number first, then as GPT-2, for "smollm", "starcoder", "refact", "command-r",
# "codeshell", "exaone" and others; the models' own tokenizer.json do so too. transformers knows none of these names
# (integrations/gguf/gguf_tokenizer_mapping.py, GGUF_PRE_TOKENIZER_SPLITS) and takes GPT-2's split without a word. So
# white space before a digit falls apart: the ids of "\n\n1" or "  7" are not those that the model was trained on.
#
# Seen: "\n\n1" is Ċ Ċ 1 from a file that states "smollm"; after
# Digits(individual_digits=True) it is ĊĊ 1. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import sys

from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

writer = GGUFWriter("file.gguf", "llama")  # the metadata alone, without weights
writer.add_name("none")
writer.add_block_count(1)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list([*bytes_to_unicode().values(), "ĊĊ"])
writer.add_token_merges(["Ċ Ċ"])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="file.gguf")
as_read = tokenizer.tokenize("\n\n1")
backend = tokenizer.backend_tokenizer
digits = pre_tokenizers.Digits(individual_digits=True)
backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
as_stated = tokenizer.tokenize("\n\n1")
print(f"as transformers reads it: {as_read}; as the file states: {as_stated}")
sys.exit(0 if (as_read, as_stated) == (["Ċ", "Ċ", "1"], ["ĊĊ", "1"]) else 1)
PYTHON
