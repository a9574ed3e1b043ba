"""Triton's interpreter without what it repeats: most of its time, and not one of its results.

Every call of a device function, each step of a scan among them, searches the whole language for what to replace,
though the launch around it has replaced it; each operation builds the table of dtypes anew; and each of its results the
shape of a block, as a tuple of constants of which each has a type of its own.
"""

import functools
import inspect

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def install() -> None:
    """The functions are private to Triton: where one is missing, nothing is replaced."""
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if all(hasattr(interpreter, name) for name in names) and hasattr(semantic, "TritonSemantic"):
        interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)
        tl.block_type.__init__ = _of_known_shape(tl.block_type.__init__)
        tl.tensor.__init__ = _as_its_block(tl.tensor.__init__)
        of_shapes = semantic.TritonSemantic
        of_shapes.broadcast_impl_value = _between_shapes(of_shapes.broadcast_impl_value)


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


def _of_known_shape(init):
    """A block's type has all of another's of that shape and element type."""
    known = {}

    def block_type(self, element_ty, shape):
        if isinstance(shape, list | tuple | tl.tuple):
            numbers = shape.values if isinstance(shape, tl.tuple) else shape
            key = element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in numbers)
            if found := known.get(key):
                self.__dict__.update(found, element_ty=element_ty)
                return
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        else:
            init(self, element_ty, shape)

    return block_type


def _as_its_block(init):
    """A tensor's shape and size are its type's, whose shape keeps them; all scalars have the same."""
    of_scalars = {}

    def tensor(self, handle, of):
        kept = of.shape.__dict__ if of.is_block() else of_scalars
        if found := kept.get("of_tensors"):
            self.handle, self.type, self.dtype = handle, of, of.scalar
            self.shape, self.numel = found
        else:
            init(self, handle, of)
            kept["of_tensors"] = self.shape, self.numel

    return tensor


def _between_shapes(broadcast):
    def broadcast_impl_value(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    return broadcast_impl_value
