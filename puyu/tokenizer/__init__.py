"""Text <-> ids: byte-level BPE training, loading, chat rendering with loss spans, parsing by token id.

    >>> from puyu import Tokenizer
    >>> tokenizer = Tokenizer.load(Path("runs/nano/tokenizer"))
    >>> tokenizer.decode(tokenizer.encode("你好, Puyu"))
    '你好, Puyu'

Knows nothing of models, data stages or servers.
"""
