"""A gate's torch value, traced, differentiated, written as kernels, compiled and held to itself: tokenrl.fuse."""
