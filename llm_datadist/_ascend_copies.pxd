from llm_datadist._acl cimport AclFailure, Device
from llm_datadist._ascend_lane cimport Lane
from llm_datadist._copy cimport CopyOutcome, Gate, Plan
from llm_datadist._local_copies cimport LocalCopier


cdef class AscendCopier(LocalCopier):
    cdef readonly Device device
    cdef object _room             # semaphore: how many more lanes may be in use
    cdef list _idle               # lanes

    # COPY_FAULT fills `failure`. `lost`: tasks could not be ended, so what they touch must stay as it is.
    cdef CopyOutcome carry(
        self, const Plan *plan, bint in_order, const Gate *gate, AclFailure *failure, bint *lost
    ) except *
    cdef CopyOutcome _carry_on(
        self, Lane lane, const Plan *plan, bint in_order, const Gate *gate, AclFailure *failure, bint *lost
    ) except *
    cdef Lane _take_lane(self, const Gate *gate)
    cdef object _move(self, object buffer, bint out, unsigned long long address, unsigned long long deadline_ns)
