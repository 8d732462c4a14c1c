// Dark or light before the first paint: as a person said here, else as the system says.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const said = () => localStorage.getItem("lorakit-theme");
  const now = () => said() || (dark.matches ? "dark" : "light");
  const put = () => {
    document.documentElement.dataset.theme = now();
    document.cookie = `lorakit_theme=${now()}; Path=/ui; SameSite=Lax; Max-Age=31536000`;
    document.dispatchEvent(new Event("lorakit-theme"));
  };
  window.lorakitTheme = {
    now,
    turn() {
      const next = now() === "dark" ? "light" : "dark";
      if (next === (dark.matches ? "dark" : "light")) localStorage.removeItem("lorakit-theme");
      else localStorage.setItem("lorakit-theme", next);
      put();
    },
  };
  dark.addEventListener("change", put);
  put();
})();
