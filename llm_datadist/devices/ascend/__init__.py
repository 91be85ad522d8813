"""Ascend NPUs as devices, through the ACL runtime of CANN; the vendor's libraries are loaded when a device is asked for."""
