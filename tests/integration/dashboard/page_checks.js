// What the tests of the page look at, from inside the page.
window.checks = (() => {
  const colour = (text) => {
    const n = (text.match(/[\d.]+/g) ?? []).map(Number);
    return { rgb: n.slice(0, 3), alpha: n[3] ?? 1 };
  };
  const blend = (over, under, alpha) => over.map((c, i) => c * alpha + under[i] * (1 - alpha));
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => {
      const s = c / 255;
      return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05);
  };

  /** All that lies behind an element's text, composed. A meter's fill lies beside its label. */
  function behind(element) {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const fill =
        e.parentElement?.classList.contains("meter") && e.classList.contains("over")
          ? e.parentElement.querySelector(".fill")
          : null;
      for (const part of [e, fill]) {
        if (!part || (part === fill && part.getBoundingClientRect().width === 0)) continue;
        const style = getComputedStyle(part),
          { rgb, alpha } = colour(style.backgroundColor);
        if (alpha > 0) layers.push([rgb, alpha * (part === fill ? Number(style.opacity) : 1)]);
      }
    }
    let found = colour(getComputedStyle(document.body).backgroundColor).rgb;
    for (const [rgb, alpha] of layers.reverse()) found = blend(rgb, found, alpha);
    return found;
  }

  return {
    weakText(least) {
      const weak = new Map(),
        walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      for (let node; (node = walker.nextNode());) {
        const of = node.parentElement,
          box = of.getBoundingClientRect();
        if (
          !node.data.trim() ||
          !box.width ||
          box.right < 0 ||
          of.closest(".hide, .skip, datalist, script, option")
        )
          continue;
        const { rgb, alpha } = colour(getComputedStyle(of).color),
          back = behind(of);
        const found = contrast(blend(rgb, back, alpha), back);
        if (found < least)
          weak.set(
            `${of.tagName}.${of.className} "${node.data.trim().slice(0, 20)}"`,
            Number(found.toFixed(2)),
          );
      }
      return [...weak].slice(0, 10);
    },
    /** Elements that reach beyond so many pixels, except inside of what scrolls by itself. */
    beyondTheEdge(widthPx) {
      return [...document.body.querySelectorAll("*")]
        .filter((e) => {
          const box = e.getBoundingClientRect();
          return (
            box.width &&
            box.right > widthPx + 1 &&
            !e.closest(".scroll, .matrix, nav, pre, .skip, .hide")
          );
        })
        .map((e) => `${e.tagName}.${e.className}`)
        .slice(0, 10);
    },
    focusShows() {
      const style = getComputedStyle(document.activeElement);
      return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
    },
    framesWhileScrolling(forMs) {
      return new Promise((done) => {
        const box = document.querySelector(".matrix"),
          frames = [],
          began = performance.now();
        let last = began;
        const next = (now) => {
          frames.push(now - last);
          last = now;
          box.scrollTop = (box.scrollTop + 60) % 20000;
          if (now - began < forMs) requestAnimationFrame(next);
          else done(frames.slice(1));
        };
        requestAnimationFrame(next);
      });
    },
    hide(hidden) {
      Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
      document.dispatchEvent(new Event("visibilitychange"));
      return true;
    },
  };
})();
1;
