"""Triton's interpreter without what it repeats: half of its time, and not one of its results.

Every call of a device function, each step of a scan among them, searches the whole language for what to replace,
though the launch around it has replaced it; and each operation builds the table of dtypes anew.
"""

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """The functions are private to Triton: where one is missing, nothing is replaced."""
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if all(hasattr(interpreter, name) for name in names):
        interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)


def _once_per_launch(patch):
    @functools.cache
    def languages(fn):
        return [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]

    def patch_lang(fn):
        replaced = all(getattr(language.range, "__name__", "") == "_new_range" for language in languages(fn))
        return interpreter._LangPatchScope() if replaced else patch(fn)

    return patch_lang


def _looked_up(find):
    find_scalar = functools.cache(find)

    def np_dtype(of):
        of = of.element_ty if isinstance(of, tl.block_type) else of
        return find_scalar(of) if type(of) is tl.dtype else find(of)

    return np_dtype
