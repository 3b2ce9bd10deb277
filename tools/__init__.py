"""The sub-commands of `palimpsest`, one thin file each: parse, call, print."""
