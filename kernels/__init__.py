"""The operations on the GPU, in Triton: one file each, imported when a call needs it, and what they share: how they are
launched (:mod:`cet.kernels.launch`) and the scores (:mod:`cet.kernels.scores`). Nothing here imports :mod:`cet.ops`.

A file reads: jit kernels, launchers that write into given outputs, functions that allocate them. Arguments are checked
by :mod:`cet.ops`, not here. Counts stay on the device.

Names in kernels:

=========  ====================================================================
``x_ptr``  argument: address of a tensor
``s_x``    argument: stride in elements, for :func:`multiple_of` in units
``i_x``    a scalar index, int64 before it meets a stride
``o_x``    a block of indices
``m_x``    the mask that belongs to it
``b_x``    a block of values
``UPPER``  a compile-time constant
=========  ====================================================================
"""
