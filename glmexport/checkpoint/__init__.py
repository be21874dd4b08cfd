"""First stage: a checkpoint's files, checked before they are mapped and read one tensor at a time.

A checkpoint is a directory as transformers writes it, from the disk or the hub: ``config.json``,
safetensors and the tokenizer's files. Nothing in it is trusted: no code is run, no pickle is opened, no link
out of it is followed, and every header, offset, index and value is checked where it is read. This stage
knows no family; what a tensor or a key means is the business of the architecture.

    files        contained paths, digests, and JSON that can be read in one way only
    header       the safetensors header, strictly
    shards       tensors and parts of tensors of safetensors files
    index        which tensor is in which shard
    layouts      by which method a checkpoint is quantized, and whose are refused
    gptq         what a GPTQ checkpoint says of its quantization
    packed       its matrices, decoded a few rows at a time
    parts        one matrix of a stack of them, and fp8 numbers with a factor a block
    derived      matrices under the name of a weight, whatever tensors they are made of
    config       typed reads of config.json
    source       demo, directory or hub id to a directory; refusal of code and pickles
    reading      errors of reading a tensor's data
    tokenizer    text and conversations to token ids
    adapter_config, adapter_tensors, low_rank
                 a LoRA adapter's settings, the places of its tensors, its arithmetic
    adapter      a LoRA adapter, opened beside its base
    fold         powers of two moved from one tensor into another
    snapshot     the files as they were when they were opened
    checkpoint   all of it, opened; an adapter is merged while tensors are read
"""

from glmexport.checkpoint.adapter import Adapter
from glmexport.checkpoint.checkpoint import Checkpoint
from glmexport.checkpoint.config import ConfigReader
from glmexport.checkpoint.fold import Fold
from glmexport.checkpoint.header import TensorEntry
from glmexport.checkpoint.source import resolve
from glmexport.checkpoint.tokenizer import Tokenizer

__all__ = ["Adapter", "Checkpoint", "ConfigReader", "Fold", "TensorEntry", "Tokenizer", "resolve"]
