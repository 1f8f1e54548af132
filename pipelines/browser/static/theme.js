"use strict";
// Before anything is drawn: the theme that was chosen here last.
try {
  const theme = localStorage.getItem("saeql-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* no storage: the system's */ }
