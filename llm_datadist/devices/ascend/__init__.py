"""Ascend NPUs, through the ACL runtime of CANN; its libraries are loaded when a device is asked for."""
