"""Libraries of the device's vendor, which are there on some machines only: how they are found, and their functions.

A library that the process has mapped already is taken first, so that two toolkits never get mixed up in one process. It
is never closed: the vendor's libraries own threads and data of threads.
"""

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <dlfcn.h>
    #include <link.h>
    static const char *llmdd_path_of(void *handle) {
        struct link_map *map = 0;
        return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != 0 ? map->l_name : "";
    }
    """
    const char *llmdd_path_of(void *handle) nogil
    void *dlopen(const char *name, int flags) nogil
    void *dlsym(void *handle, const char *name) nogil
    const char *dlerror() nogil
    int RTLD_NOW, RTLD_GLOBAL, RTLD_NOLOAD

# Where the vendor installs, the newer place first. The loader reads LD_LIBRARY_PATH at the start of a process only, so
# that a process which was started without set_env.sh depends on these.
ROOT_VARIABLE = "ASCEND_HOME_PATH"
DEFAULT_ROOTS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")


class VendorError(Exception):
    """Something of the device's vendor is missing or failed; the kinds of it say what."""


class CallFailed(VendorError):
    """A function of the vendor's failed.

    Attributes
    ----------
    function : str
        Its name.
    code : int
        What it returned; negative for refusals of this library.
    text : str
        What the vendor's library says about it; may be empty.
    """

    def __init__(self, function, code, text=""):
        super().__init__(function, code, text)
        self.function = function
        self.code = code
        self.text = text

    def __str__(self):
        return f"{self.function} failed with {self.code}" + (f": {self.text}" if self.text else "")


class LibraryMissing(VendorError):
    """A library of the vendor, or a function that is needed of it, is not on this machine.

    Attributes
    ----------
    names : tuple of str
        The libraries that would do.
    attempts : tuple of str
        What was tried, with the answer of the dynamic loader; or, with `symbol`, the libraries that lack it.
    symbol : str or None
        The function that is missing.
    """

    def __init__(self, names, attempts=(), symbol=None):
        super().__init__(names, attempts, symbol)
        self.names = names
        self.attempts = attempts
        self.symbol = symbol

    def __str__(self):
        if self.symbol is not None:
            return f"{self.symbol} is missing in {', '.join(self.attempts)}: the installed CANN is too old"
        return (
            f"none of {', '.join(self.names)} can be loaded: CANN is not installed, or its set_env.sh was not sourced"
            " before this process was started\n" + "\n".join(f"  {attempt}" for attempt in self.attempts)
        )


cdef class SharedLibrary:
    """One library of the vendor, whose functions may be spread over several files of the same installation.

    Parameters
    ----------
    names : tuple of str
        Files, the first ones preferred; at most 4.
    variable : str
        Environment variable that names the only file to look in, by its absolute path.
    """

    def __init__(self, tuple names not None, str variable not None):
        if not 0 < len(names) <= 4:
            raise ValueError(f"{len(names)} names of a library, should be 1 to 4")
        self.names = names
        self.variable = variable
        self.paths = []
        self.missing = []
        self._left = []

    cdef int open(self) except -1:
        """Open the first of the files that is there; LibraryMissing if none is."""
        cdef list attempts = []
        forced = os.environ.get(self.variable)
        if forced is not None:
            if not os.path.isabs(forced):
                raise LibraryMissing(self.names, (f"{self.variable}={forced}: not an absolute path",))
            if not self._open_file(forced, False, attempts):
                raise LibraryMissing(self.names, tuple(attempts))
            return 0
        root = os.environ.get(ROOT_VARIABLE)
        places = [""] + [os.path.join(place, "lib64", "") for place in ((root,) if root else ()) + DEFAULT_ROOTS]
        found = self._open_first(list(self.names), True, [])
        for place in places:
            found = found or self._open_first([place + name for name in self.names], False, attempts)
        if not found:
            raise LibraryMissing(self.names, tuple(attempts))
        self._left = [name for name in self.names if name != os.path.basename(self.paths[0])]
        return 0

    cdef bint _open_first(self, list files, bint if_loaded, list attempts) except -1:
        for file in files:
            if self._open_file(file, if_loaded, attempts):
                return True
        return False

    cdef bint _open_file(self, str file, bint if_loaded, list attempts) except -1:
        cdef bytes encoded = os.fsencode(file)
        cdef const char *name = encoded
        cdef int flags = RTLD_NOW | RTLD_GLOBAL  # the vendor's libraries look each other's functions up
        cdef void *handle
        cdef const char *error = NULL
        if if_loaded:
            flags |= RTLD_NOLOAD
        with nogil:
            handle = dlopen(name, flags)
            if handle == NULL:
                error = dlerror()  # of this thread
        if handle == NULL:
            text = "not loaded" if error == NULL else error.decode(errors="replace")
            attempts.append(text if file in text else f"{file}: {text}")
            return False
        self._handles[self._num_handles] = handle
        self._num_handles += 1
        self.paths.append(os.fsdecode(llmdd_path_of(handle)))
        return True

    cdef void *find(self, const char *name) except? NULL:
        """Address of a name; NULL if no file of this installation has it."""
        cdef void *address
        cdef int looked_in = 0
        while True:
            while looked_in < self._num_handles:
                address = dlsym(self._handles[looked_in], name)
                if address != NULL:
                    return address
                looked_in += 1
            if not self._left:
                return NULL
            # Only from the folder of the first one: elsewhere there may be another release.
            self._open_file(os.path.join(os.path.dirname(self.paths[0]), self._left.pop(0)), False, [])

    cdef int require(self, const char *name, void **slot) except -1:
        """Find a function without which nothing goes."""
        slot[0] = self.find(name)
        if slot[0] == NULL:
            raise LibraryMissing(self.names, tuple(self.paths), name.decode())
        return 0

    cdef int accept(self, const char *name, void **slot) except -1:
        """Find a function that may be missing; its slot is NULL then."""
        slot[0] = self.find(name)
        if slot[0] == NULL:
            self.missing.append(name.decode())
        return 0
