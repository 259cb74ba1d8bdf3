"""llama.cpp's tokenizers on a GGUF file alone, weights or not, through the library inside the package xllamacpp."""

import ctypes
from pathlib import Path

import xllamacpp

_LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
_POINTER = ctypes.c_void_p


class _ModelParams(ctypes.Structure):
    """`llama_model_params` of the pinned version, with room behind for what a later one adds."""

    _fields_ = [
        ("devices", _POINTER), ("tensor_buft_overrides", _POINTER), ("n_gpu_layers", ctypes.c_int32), ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int), ("lazy_mode", ctypes.c_int), ("main_gpu", ctypes.c_int32), ("tensor_split", _POINTER),
        ("progress_callback", _POINTER), ("progress_callback_user_data", _POINTER), ("kv_overrides", _POINTER),
        ("vocab_only", ctypes.c_bool), ("more", ctypes.c_ubyte * 63)]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
_QUIET = _LOG(lambda level, text, data: None)
_LIBRARY.llama_log_set.argtypes = [_LOG, _POINTER]
_LIBRARY.llama_log_set(_QUIET, None)
_LIBRARY.llama_model_default_params.restype = _ModelParams
_LIBRARY.llama_model_load_from_file.restype = _POINTER
_LIBRARY.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
_LIBRARY.llama_model_get_vocab.restype = _POINTER
_LIBRARY.llama_model_get_vocab.argtypes = [_POINTER]
_LIBRARY.llama_tokenize.restype = ctypes.c_int32
_LIBRARY.llama_tokenize.argtypes = [
    _POINTER, ctypes.c_char_p, ctypes.c_int32, _POINTER, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
_LIBRARY.llama_vocab_n_tokens.argtypes = [_POINTER]
_LIBRARY.llama_vocab_is_eog.argtypes = [_POINTER, ctypes.c_int32]
_LIBRARY.llama_vocab_is_eog.restype = ctypes.c_bool


class Vocabulary:
    def __init__(self, path):
        params = _LIBRARY.llama_model_default_params()
        params.vocab_only = True
        model = _LIBRARY.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ValueError(f"llama.cpp does not open {path}")
        self._vocabulary = _LIBRARY.llama_model_get_vocab(model)

    def ids(self, text, add_special=False):
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = _LIBRARY.llama_tokenize(self._vocabulary, data, len(data), ids, room, add_special, True)
        assert count >= 0, text
        return list(ids[:count])

    def ends(self):
        """Ids that end generation."""
        count = _LIBRARY.llama_vocab_n_tokens(self._vocabulary)
        return [token for token in range(count) if _LIBRARY.llama_vocab_is_eog(self._vocabulary, token)]
