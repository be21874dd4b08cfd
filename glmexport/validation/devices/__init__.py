"""A bundle asked on other machines: one job, whatever carries it there, and its results judged here.

    job       what is asked, as files
    program   what a device runs: Python, numpy and ONNX Runtime, nothing of this package
    runner    what every way to a device has in common
    local     this machine, in a process of its own
    ssh       a machine that is reached by SSH
    emulated  the program of another architecture, under QEMU
    kit       an archive that is carried to a device, and what is brought back
    answers   results, checked before they are believed
    judging   what a validation measures, from results
    fleet     several devices side by side

A device is believed in nothing but its own speed: what it answers is compared here.
"""
