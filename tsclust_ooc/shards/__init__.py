"""Input files: what a source holds, and how samples are read out of it, without trusting a byte of it.

    survey    lists a source, learns its schema, names every problem          main process
    templates proves that a shard's metadata equals one HDF5 has parsed       main process, many threads
    parsers   a few child processes that parse what has no template           main process
    hdf5      the guarded open and read, the only module that imports h5py    child process
    layouts   how datasets in a file map to samples                           both

Invariant: libhdf5 never runs in the main process, so a file that crashes, hangs or bombs it costs one shard.
"""
