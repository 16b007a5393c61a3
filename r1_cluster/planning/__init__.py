"""From a service file to a layout: who owns which layers and experts."""
